"""Whether ranks share memory is one decision of all; which sums go over it; an engine of ranks that do."""

import importlib.util
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from octavo.engine.build import Phases, assemble, build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.core.engine import EngineCore
from octavo.engine.parallel import symmetric
from octavo.engine.parallel.layout import Layout
from octavo.engine.parallel.nvlink import nvlink_obstacle
from octavo.engine.parallel.symmetric import LIMITS, Ballot, Place, SymmetricLink, obstacle, trial
from octavo.engine.params import SamplingParams
from octavo.engine.process.ranks import Deadlines, Ranks
from octavo.engine.types import Request
from octavo.kernels.triton.allreduce import PROGRAMS, Peers

sys.path.insert(0, str(Path(__file__).parent))
from sharing import Sharing, shared_files

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[2] / "models" / "tiny.py")
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
OPTIONS = {
    "dtype": "float32",
    "block_size": 8,
    "max_model_len": 64,
    "max_num_batched_tokens": 16,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 20,
}
CPU = torch.device("cpu")
PLACES = [Place("node a", f"GPU-{i}") for i in range(4)]


def linked(gpu: str, others: Sequence[str]) -> str:
    return ""


def test_what_keeps_ranks_from_sharing_memory() -> None:
    assert obstacle(PLACES, 1, linked) == ""
    assert obstacle([*PLACES, Place("node b", "GPU-9")], 1, linked) == "its ranks are on several nodes"
    assert obstacle([*PLACES, PLACES[2]], 1, linked) == "ranks share a GPU"
    assert obstacle([*PLACES, Place("node a", "GPU-9", "no Triton")], 1, linked) == "no Triton"
    assert obstacle([Place("a", str(i)) for i in range(9)], 1, linked) == "it is made for 2 to 8 ranks"
    asked = []
    assert obstacle(PLACES, 1, lambda gpu, others: asked.append((gpu, others)) or "no link") == "no link"
    assert asked == [("GPU-1", ["GPU-0", "GPU-2", "GPU-3"])]


class NVML:
    """GPUs 0 to 3, of which 3 is connected with none."""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: object) -> int:
        number = int(uuid.removeprefix(b"GPU-"))
        handle._obj.value = number + 1
        return 0 if number < 4 else 6

    def nvmlDeviceGetP2PStatus(self, a: object, b: object, index: object, status: object) -> int:
        assert index.value == 2
        status._obj.value = 5 if 4 in (a.value, b.value) else 0
        return 0


def test_nvml_is_asked_about_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: NVML())
    assert nvlink_obstacle("GPU-0", ["GPU-1", "GPU-2"]) == ""
    assert nvlink_obstacle("GPU-0", ["GPU-1", "GPU-3"]) == "NVLink does not connect GPU-0 and GPU-3"
    assert "UUID" in nvlink_obstacle("GPU-0", ["GPU-7"])


def test_one_rank_that_cannot_is_enough() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        said = pool.map(lambda rank: Ballot(store, rank, 3).first("x", "too old" if rank == 1 else ""), range(3))
    assert list(said) == ["too old"] * 3
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda rank: Ballot(store, rank, 3).first("y", ""), range(3))) == [""] * 3


class Below:
    """Another link, that says what it was asked."""

    recordable = True

    def all_reduce(self, x: torch.Tensor) -> str:
        return f"below {tuple(x.shape)}"


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> SymmetricLink:
    """A link of 4 ranks whose kernels say their names."""
    for body in ("one_shot", "two_shot"):
        monkeypatch.setattr(symmetric.allreduce, body, lambda x, peers, body=body: body)
    monkeypatch.setattr(symmetric.allreduce, "sum_add_rms_norm", lambda *args: "norm")
    peers = Peers(0, 4, torch.zeros(4, dtype=torch.int64), torch.zeros(PROGRAMS, dtype=torch.int32), 128 << 10)
    return SymmetricLink(Below(), peers, LIMITS[4], None)


def test_size_and_type_decide_who_adds_up(named: SymmetricLink) -> None:
    def half(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    assert named.all_reduce(half(64, 4096)) == "one_shot"
    assert named.all_reduce(half(65, 4096)) == "two_shot"
    assert named.all_reduce(half(1024, 4096)) == "two_shot"
    assert named.all_reduce(half(1025, 4096)) == "below (1025, 4096)"
    assert named.all_reduce(torch.ones(3, dtype=torch.int64)) == "below (3,)"
    assert named.sum_add_rms_norm(half(64, 4096), half(64, 4096), half(4096), 1e-5, None) == "norm"
    assert named.sum_add_rms_norm(half(65, 4096), half(65, 4096), half(4096), 1e-5, None) is None


@pytest.mark.parametrize("size", LIMITS)
def test_there_is_room_up_to_the_limits(size: int, named: SymmetricLink) -> None:
    limits = LIMITS[size]
    assert 0 < limits.one_shot <= limits.two_shot
    for dtype in symmetric.DTYPES:
        assert symmetric.allreduce.fits(torch.empty(limits.two_shot // dtype.itemsize, dtype=dtype), named.peers)


def test_a_trial_finds_a_wrong_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sums:
        one_shot_bytes, most_bytes = 8192, 16384

        def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            count = torch.arange(len(x), dtype=torch.int32)
            other = ((count * 4 + self.turn) % 16).bfloat16()
            return x + other

    sums = Sums()
    sums.turn = 0
    assert "4096 bytes" in trial(sums, 0, 2, CPU), "right in the first turn, and wrong from then on"
    monkeypatch.setattr(symmetric, "TURNS", 1)
    assert trial(sums, 0, 2, CPU) == ""
    sums.turn = "x"
    assert trial(sums, 0, 2, CPU).startswith("TypeError")


def answers(core: EngineCore) -> list[list[int]]:
    """Of two greedy requests in one batch, in chunks."""
    got: dict[str, list[int]] = {}
    for name, prompt in zip("ab", tiny.prompts((5, 14)), strict=True):
        core.add(Request(name, tuple(prompt), GREEDY))
        got[name] = []
    while core.has_work:
        for delta in core.step():
            assert delta.error is None, delta.error
            got[delta.request_id].extend(delta.token_ids)
    return list(got.values())


def test_ranks_that_share_memory_give_the_tokens_of_one(tmp_path: Path) -> None:
    folder, done, part_bytes = str(tiny.make("llama", tmp_path)), tmp_path / "done", 16 << 10
    alone = build_engine(EngineConfig(folder, kernels="ref", **OPTIONS)).core
    expected = answers(alone)
    alone.close()
    config = EngineConfig(folder, kernels="triton", tensor_parallel_size=2, **OPTIONS)
    with shared_files(2, part_bytes) as files:
        ranks = Ranks(config, Layout(2), Sharing(files, part_bytes, done), Deadlines(hang_s=60), Phases(None))
        core = assemble(config, ranks.info, ranks).core
        try:
            assert answers(core) == expected
        finally:
            core.close()
    sums = done.read_text()
    assert {"o", "t", "n"} <= set(sums), "the embedding's, those of chunks, those of decode steps"


class Member(Below):
    label = "tp group of ranks 0, 1"

    def __init__(self, rank: int) -> None:
        self.rank, self.size = rank, 2


@pytest.mark.parametrize("broken", ["", "place", "memory", "sums"])
def test_ranks_decide_together(broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One of two finds something wrong, now at this point, now at that: neither shares memory, and one says why."""

    def allocate(store: dist.Store, link: Member, device: torch.device) -> tuple[Peers, object]:
        if broken == "memory" and link.rank == 1:
            raise RuntimeError("CUDA driver error: no\nmore")
        calls = torch.zeros(PROGRAMS, dtype=torch.int32)
        return Peers(link.rank, 2, torch.zeros(2, dtype=torch.int64), calls, 128 << 10), None

    names = iter(("GPU-0", "GPU-1"))
    monkeypatch.setattr(symmetric, "_place", lambda device: Place("a", next(names)))
    monkeypatch.setattr(symmetric, "nvlink_obstacle", lambda gpu, _: "no link" if broken == "place" else "")
    monkeypatch.setattr(symmetric, "_allocate", allocate)
    monkeypatch.setattr(
        symmetric, "trial", lambda link, rank, *_: "wrong sums" if broken == "sums" and rank == 0 else ""
    )
    caplog.set_level("INFO", symmetric.__name__)
    store, members = dist.HashStore(), [Member(0), Member(1)]
    with ThreadPoolExecutor(2) as pool:
        links = list(pool.map(lambda member: symmetric.share_memory(member, store, CPU), members))
    assert len(caplog.messages) == 1
    if not broken:
        assert all(isinstance(link, SymmetricLink) for link in links)
        assert caplog.messages[0] == "The tp group of ranks 0, 1 adds up over shared memory, from 8 MiB on with NCCL."
        return
    assert links == members
    why = {"place": "no link", "memory": "CUDA driver error: no", "sums": "wrong sums"}[broken]
    assert caplog.messages[0] == f"The tp group of ranks 0, 1 adds up with NCCL alone: {why}."
