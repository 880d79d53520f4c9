"""`octavo batch`: OpenAI's batch files, answered here or by a server, whatever happens to the run meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from octavo.cluster.batch import items
from octavo.cluster.batch.journal import Journal
from octavo.cluster.cli import app
from octavo.engine.errors import ConfigError

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def run(*arguments, model="fake:step_ms=0.1"):
    chosen = ["--model", model] if model else []
    return CliRunner().invoke(app, ["batch", *chosen, *map(str, arguments)])


def line(custom_id, url=TEXT, body=None, **more):
    body = {"prompt": "Hi", "max_tokens": 5, "ignore_eos": True} if body is None else body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more}


def write(path, lines):
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in lines))


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def usage_of(answer):
    return answer["response"]["body"]["usage"]


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def test_answers_are_those_of_the_server_in_openais_shape(files):
    source, target = files
    hi = [{"role": "user", "content": "Hi"}]
    write(source, [
        line("text"),
        line("chat", CHAT, {"messages": hi, "max_tokens": 7, "n": 2, "temperature": 1}),
        "",
        line("count", "/tokenize", {"prompt": "abc"}),
        line("vectors", "/v1/embeddings", {"input": ["a", "b"]}),
        line("claude", "/v1/messages", {"messages": hi, "max_tokens": 3}),
        line("wrong", CHAT, {"messages": hi, "temperature": -1}),
        line("nowhere", "/v1/nothing"),
    ])  # fmt: skip
    result = run(source, target)
    assert result.exit_code == 1, result.output
    answers = {answer["custom_id"]: answer for answer in read(target)}
    assert answers.keys() == {"text", "chat", "count", "vectors", "claude", "wrong", "nowhere"}
    assert all(set(answer) == {"id", "custom_id", "response", "error"} for answer in answers.values())
    assert all(set(answer["response"]) == {"status_code", "request_id", "body"} for answer in answers.values())
    assert len({answer["id"] for answer in answers.values()}) == 7
    assert all(answer["response"]["request_id"] for answer in answers.values())
    assert answers["text"]["response"]["body"]["usage"]["completion_tokens"] == 5
    assert len(answers["chat"]["response"]["body"]["choices"]) == 2
    assert answers["count"]["response"]["body"]["count"] == 4
    assert answers["wrong"]["response"]["status_code"] == 400
    assert answers["wrong"]["response"]["body"]["error"]["param"] == "temperature"
    assert answers["nowhere"]["response"]["status_code"] == 404
    assert len(answers["vectors"]["response"]["body"]["data"]) == 2
    generated = sum(usage_of(answers[name])["completion_tokens"] for name in ("text", "chat"))
    generated += usage_of(answers["claude"])["output_tokens"]
    assert f"generated ({generated})" in result.output.replace("\n", " ")
    assert "5 answered, 2 errors, 0 were there already" in result.output
    assert "tokens/s" in result.output


def test_a_line_that_is_no_request_gets_an_error_line_and_stops_nothing(files, tmp_path):
    source, target = files
    errors = tmp_path / "errors.jsonl"
    lines = [
        "{broken", "[1]", "[" * 100000, '{"custom_id": 5}', line("a"), line("a"), line("get", method="GET"),
        line("far", "http://elsewhere/v1"), line("no body", body=[]), line("stream", body={"stream": True}),
        line("nan", body={"prompt": "x", "temperature": float("nan")}), line("", TEXT), line("z"),
    ]  # fmt: skip
    write(source, lines)
    assert run(source, target, "--errors", errors).exit_code == 1
    assert sorted(answer["custom_id"] for answer in read(target)) == ["a", "z"]
    by_line = {entry["error"]["line"]: entry for entry in read(errors) if entry["error"]}
    assert {number: entry["error"]["code"] for number, entry in by_line.items()} == {
        1: "invalid_json_line", 2: "invalid_json_line", 3: "invalid_json_line", 4: "invalid_custom_id",
        6: "duplicate_custom_id", 7: "invalid_method", 8: "invalid_url", 9: "invalid_body", 10: "invalid_body",
        12: "invalid_custom_id",
    }  # fmt: skip
    assert by_line[6]["custom_id"] == "a"
    assert [entry["custom_id"] for entry in read(errors) if not entry["error"]] == ["nan"]
    before = target.read_bytes(), errors.read_bytes()
    again = run(source, target, "--errors", errors)
    assert (again.exit_code, (target.read_bytes(), errors.read_bytes())) == (0, before), again.output


def test_the_second_run_does_what_is_missing_and_repairs_a_torn_line(files):
    source, target = files
    write(source, [line(f"r{i}") for i in range(6)])
    write(source.with_suffix(".part"), [line(f"r{i}") for i in range(3)])
    assert run(source.with_suffix(".part"), target).exit_code == 0
    whole = target.read_bytes()
    for cut in (1, 5, 20, 100):
        target.write_bytes(whole[:-cut])
        assert run(source.with_suffix(".part"), target).exit_code == 0
        assert sorted(answer["custom_id"] for answer in read(target)) == ["r0", "r1", "r2"]
    result = run(source, target)
    assert result.exit_code == 0
    assert "3 answered, 0 errors, 3 were there already" in result.output
    assert sorted(answer["custom_id"] for answer in read(target)) == [f"r{i}" for i in range(6)]
    assert "6 were there already" in run(source, target, model=None).output  # and loads no model


def test_a_run_that_is_killed_again_and_again_loses_and_repeats_nothing(files):
    source, target = files
    write(source, [line(f"r{i}", body={"prompt": f"p{i}", "max_tokens": 30, "ignore_eos": True}) for i in range(120)])
    command = [sys.executable, "-m", "octavo.cluster.cli", "batch", "--model", "fake:step_ms=2", source, target,
               "--concurrency", "6"]  # fmt: skip
    for number in range(2):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        begun = target.stat().st_size if target.exists() else 0
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (
            not target.exists() or target.stat().st_size < begun + 2000 + 300 * number
        ):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL if number < 1 else signal.SIGINT)
        code = process.wait(timeout=20)
        assert code == (-signal.SIGKILL if number < 1 else 130)
    done = len(read(target))
    assert 0 < done < 120
    result = run(source, target)
    assert result.exit_code == 0, result.output
    assert f"{done} were there already" in result.output
    assert sorted(answer["custom_id"] for answer in read(target)) == sorted(f"r{i}" for i in range(120))


def test_a_running_server_answers_too_and_is_asked_again_while_it_is_busy(harness, files):
    from octavo.engine.errors import CapacityError

    source, target = files
    write(source, [line(f"r{i}") for i in range(20)])

    class Busy(harness.Client):
        refusals = 5

        async def generate(self, request, *more):
            if self.refusals:
                self.refusals -= 1
                raise CapacityError("busy", retry_after_s=1)
            async for delta in super().generate(request, *more):
                yield delta

    client = Busy()
    with harness.server(client, api_keys=("key",)) as url:
        result = run(source, target, "--url", f"{url}/v1", "--api-key", "key", "--concurrency", 16, model=None)
        assert result.exit_code == 0, result.output
        assert len(read(target)) == 20
        assert client.refusals == 0
        wrong = run(source, files[1].with_suffix(".2"), "--url", url, "--api-key", "no", model=None)
    assert wrong.exit_code == 1
    assert "401" in wrong.output


def test_what_got_no_answer_is_left_to_the_next_run(harness, files):
    from octavo.cluster.ingress.client import ReplicaLost

    source, target = files
    write(source, [line(f"r{i}") for i in range(3)])
    with harness.server(harness.Client(fail=ReplicaLost("gone"))) as url:
        result = run(source, target, "--url", url, "--retries", 0, model=None)
    assert (result.exit_code, target.read_bytes()) == (1, b"")
    assert "3 requests got no answer" in result.output
    gone = run(source, target, "--url", url, "--retries", 0, model=None)
    assert gone.exit_code == 2
    assert "No server answers" in gone.output


def test_files_that_cannot_be_used(files):
    source, target = files
    write(source, [line("a")])
    assert run(source.with_suffix(".none"), target).exit_code == 2
    assert run(source, source).exit_code == 2
    write(target, [{"custom_id": "x"}])
    foreign = run(source, target)
    assert (foreign.exit_code, "line 1" in foreign.output) == (2, True)
    assert read(target) == [{"custom_id": "x"}]
    assert run(source, target, "--url", "http://127.0.0.1:9").exit_code == 2  # with --model
    target.unlink()
    with Journal(target), pytest.raises(ConfigError, match="Another run"):
        Journal(target)


def test_a_full_disk_leaves_no_half_line(files, monkeypatch):
    _, target = files
    record = {"id": "x", "custom_id": "a", "response": None, "error": None}
    write_some = os.write
    with Journal(target) as journal:
        journal.append(record)
        before = target.read_bytes()
        calls = iter([lambda fd, data: write_some(fd, data[:7])])

        def write(fd, data):
            for call in calls:
                return call(fd, data)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("octavo.cluster.batch.journal.os.write", write)
        with pytest.raises(OSError, match="No space"):
            journal.append({**record, "custom_id": "b"})
        monkeypatch.undo()
        assert target.read_bytes() == before
        journal.append({**record, "custom_id": "c"})
    assert [entry["custom_id"] for entry in read(target)] == ["a", "c"]


def test_an_input_of_any_length_is_read_line_by_line(files, monkeypatch):
    source, _ = files
    monkeypatch.setattr(items, "MAX_LINE_BYTES", 1000)
    write(source, [line("a"), json.dumps(line("b", body={"prompt": "x" * 5000})), line("c")])
    found = list(items.read_items(source))
    assert [getattr(item, "custom_id", None) for item in found] == ["a", None, "c"]
    assert (found[1].code, found[1].line) == ("line_too_long", 2)
