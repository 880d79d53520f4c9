"""The conversation with workers, with a worker that has no engine."""

import json
import sys
import textwrap
import time
from pathlib import Path

import pytest
from worker import Worker, WorkerError

WORKERS = Path(__file__).parents[2] / "benchmarks" / "workers"
ECHO = textwrap.dedent("""
    import os, time
    from jobs import Loaded, serve

    def load(model, max_rows):
        print("engines print a lot")
        if model == "broken":
            raise ValueError("no such model")
        return Loaded(generate, {"echo": "1"}, model)

    def generate(prompts, output_len):
        print("noise")
        if output_len == 13:
            os._exit(3)
        if output_len == 14:
            time.sleep(60)
        return [prompt[:output_len] for prompt in prompts]

    serve(load)
""")


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    worker = Worker("echo", [sys.executable, script], {"PYTHONPATH": str(WORKERS)}, tmp_path / "echo.log")
    yield worker
    worker.close()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_jobs_are_answered_whatever_the_engine_prints(worker):
    loaded = worker.ask({"op": "load", "model": "tiny", "max_rows": 4}, 30)
    assert (loaded["versions"], loaded["notes"]) == ({"echo": "1"}, "tiny")
    answer = worker.ask({"op": "generate", "prompts": [[1, 2, 3], [4, 5, 6]], "output_len": 2}, 30)
    assert answer["token_ids"] == [[1, 2], [4, 5]]
    assert 0 <= answer["seconds"] < 1
    assert "noise" in worker.log.read_text()


def test_a_large_job_passes(worker):
    worker.ask({"op": "load", "model": "tiny", "max_rows": 4}, 30)
    prompts = [[i] * 4000 for i in range(64)]
    assert len(json.dumps(prompts)) > 500_000
    assert worker.ask({"op": "generate", "prompts": prompts, "output_len": 4000}, 30)["token_ids"] == prompts


def test_between_jobs_a_worker_is_frozen(worker):
    worker.ask({"op": "load", "model": "tiny", "max_rows": 4}, 30)
    deadline = time.monotonic() + 5
    while state(worker._process.pid) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(worker._process.pid) == "T"


def test_an_error_is_told_with_its_words(worker):
    with pytest.raises(WorkerError, match="ValueError: no such model"):
        worker.ask({"op": "load", "model": "broken", "max_rows": 4}, 30)


@pytest.mark.parametrize(("output_len", "words"), [(13, "died with exit code 3"), (14, "did not answer in time")])
def test_a_dead_or_silent_worker_is_an_error_not_a_hang(worker, output_len, words):
    worker.ask({"op": "load", "model": "tiny", "max_rows": 4}, 30)
    with pytest.raises(WorkerError, match=words):
        worker.ask({"op": "generate", "prompts": [[1]], "output_len": output_len}, 1.5)
    worker._process.kill()


def test_a_worker_may_be_closed_twice(worker):
    worker.ask({"op": "load", "model": "tiny", "max_rows": 4}, 30)
    worker.close()
    worker.close()
    assert worker._process.poll() is not None
