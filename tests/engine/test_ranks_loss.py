"""Lost ranks: real processes killed and stopped, steps that fail or never end. The first is named, nobody is left.

Ranks without a model: this is about processes.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from launchers import Processes, Threads

from octavo.engine.build import Phases, assemble
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.errors import RankLost
from octavo.engine.loop import EngineLoop
from octavo.engine.parallel.layout import Layout
from octavo.engine.params import SamplingParams
from octavo.engine.process import rank as rank_module
from octavo.engine.process.ranks import Deadlines, Ranks
from octavo.engine.types import Request

pytestmark = pytest.mark.live

LONG = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True)


def start(launcher, tp: int = 2, pp: int = 1, **deadlines: float) -> EngineCore:
    config = EngineConfig("fake", tensor_parallel_size=tp, pipeline_parallel_size=pp)
    ranks = Ranks(config, Layout(tp, pp), launcher, Deadlines(**deadlines), Phases(None))
    return assemble(config, ranks.info, ranks).core


def step_until_lost(core: EngineCore) -> tuple[str, float]:
    """(what the RankLost says, how long it took)."""
    started = time.monotonic()
    while time.monotonic() - started < 20:
        try:
            core.step()
        except RankLost as error:
            return str(error), time.monotonic() - started
    raise AssertionError("no rank was lost")


def alive(pid: int) -> bool:
    """A zombie, whose parent has not asked yet, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("sign", "within", "why"),
    [
        (signal.SIGKILL, 1.5, "its process ended with SIGKILL."),
        (signal.SIGSTOP, 5.0, "it has given no sign of life for "),
    ],
    ids=["killed", "stopped"],
)
def test_a_process_is_lost_in_the_middle_of_a_request(sign, within, why):
    core = start(Processes(), tp=1, pp=3)
    core.add(Request("r", (1, 2, 3), LONG))
    for _ in range(20):
        core.step()
    pids = [rank.pid for rank in core.ranks()]
    os.kill(pids[1], sign)
    message, seconds = step_until_lost(core)
    assert message.startswith(f"Rank 1/3 (stage 1, tp 0) on node here, pid {pids[1]}, was lost: {why}")
    assert seconds < within
    assert not any(map(alive, pids))
    with pytest.raises(RankLost):
        core.check()
    core.close()


def test_an_idle_engine_notices_within_a_second():
    core = start(Processes())
    loop = EngineLoop(core, lambda deltas: None)
    loop.start()
    time.sleep(0.3)
    started = time.monotonic()
    os.kill(core.ranks()[0].pid, signal.SIGKILL)
    while loop.failure is None:
        assert time.monotonic() - started < 1.5
        time.sleep(0.01)
    assert "Rank 0/2" in str(loop.failure)
    loop.stop()


def test_nobody_hears_the_ranks_while_nobody_asks_and_none_is_lost():
    core = start(Processes(), hang_s=1.5)
    time.sleep(2.5)
    core.check()
    assert max(rank.heartbeat_age_s for rank in core.ranks()) < 1.5
    core.close()


def test_a_rank_that_never_comes_is_named():
    with pytest.raises(RankLost, match=r"^Rank 1/2 \(stage 0, tp 1\) was lost: it has not called within 2 s"):
        start(Processes(kept=[1]), call_s=2.0)


def test_ranks_end_when_their_driver_is_gone(tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_ranks_loss import Processes, start\n"
        "if __name__ == '__main__':\n"
        "    print(*(rank.pid for rank in start(Processes()).ranks()), flush=True)\n"
        "    time.sleep(60)\n"
    )
    driver = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    assert all(map(alive, pids))
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 3
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Broken:
    """Stands in for a rank's runner: rank `number` fails, or never ends, at its fifth step."""

    def __init__(self, monkeypatch, number: int, fault) -> None:
        allocate = rank_module.FakePart.allocate
        self.number, self.fault = number, fault
        monkeypatch.setattr(
            rank_module.FakePart, "allocate", lambda part, *sizes: self.runner(part, allocate(part, *sizes))
        )

    def runner(self, part, inner):
        fault, number = self.fault, self.number

        class Runner:
            def execute(self, plan, masks):
                if part._spec.rank == number and plan.step_id == 5:
                    fault()
                return inner.execute(plan, masks)

        return Runner()


def test_a_step_that_fails_on_a_rank_names_it_and_the_error(monkeypatch):
    def fault():
        raise ValueError("a bug")

    Broken(monkeypatch, 1, fault)
    core = start(Threads(), tp=3)
    core.add(Request("r", (1, 2, 3), LONG))
    message, _ = step_until_lost(core)
    assert message.startswith("Rank 1/3 (stage 0, tp 1)")
    assert message.endswith("was lost: ValueError: a bug.")
    core.close()


def test_who_fails_because_of_another_is_not_named(monkeypatch):
    """Rank 0 loses its peer before the peer's own end is known."""

    def fault():
        raise RankLost("the tp group broke")

    Broken(monkeypatch, 0, fault)
    core = start(Threads(), tp=2)
    ranks = core.process
    take = ranks._take
    ranks._take = lambda came: take([*came, *((1, None) for _, message in came if type(message).__name__ == "Failed")])
    core.add(Request("r", (1, 2, 3), LONG))
    message, _ = step_until_lost(core)
    assert message.startswith("Rank 1/2")
    core.close()


def test_a_step_that_never_ends_is_lost_while_the_pulse_goes_on(monkeypatch):
    Broken(monkeypatch, 1, lambda: time.sleep(4))
    core = start(Threads(), tp=1, pp=2, step_s=1.5, hang_s=1.5)
    core.add(Request("r", (1, 2, 3), LONG))
    message, seconds = step_until_lost(core)
    assert "Rank 1/2 (stage 1, tp 0)" in message
    assert "a step has not ended within 1.5 s" in message
    assert seconds < 8
    core.close()


WATCHED = """
import sys, time
from octavo.engine.process.watchdog import Watchdog
dog = Watchdog(1.0)
dog.start()
print(dog._child.pid, flush=True)
sys.stdin.readline()
dog.close()
print("closed", flush=True)
sys.stdin.readline()
"""


def watched() -> tuple[subprocess.Popen, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, int(process.stdout.readline())


def test_the_watchdog_ends_a_stopped_parent():
    process, child = watched()
    rss = int(Path(f"/proc/{child}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert rss < 16 << 20
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    assert process.wait(timeout=4) == -signal.SIGKILL
    deadline = time.monotonic() + 2
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_closed_watchdog_is_gone_and_its_parent_free():
    process, child = watched()
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "closed\n"
    assert not alive(child)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    assert process.poll() is None
    process.kill()
    process.wait()
