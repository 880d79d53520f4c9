"""`octavo generate` with the fake engine: answers, resumption after a crash, and lines that are wrong."""

import json

import pytest
import typer
from typer.testing import CliRunner

from octavo.cluster import offline
from octavo.engine import LLM, SamplingParams
from octavo.engine.errors import ConfigError


def run(*arguments):
    app = typer.Typer()
    app.command()(offline.generate)
    return CliRunner().invoke(app, ["--model", "fake", *map(str, arguments)])


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def read(path):
    return {answer["id"]: answer for answer in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def test_answers_are_those_of_the_engine(files):
    source, target = files
    write(
        source,
        [
            {"id": "a", "prompt": "Once upon"},
            {"prompt": [1, 2, 3], "max_tokens": 5},
            "",
            {"id": 7, "messages": [{"role": "user", "content": "Hi"}], "n": 2, "temperature": 1.0},
        ],
    )
    result = run(source, target, "--max-tokens", 9, "--seed", 1, "--ignore-eos", "--temperature", 0)
    assert result.exit_code == 0, result.output
    answers = read(target)
    assert answers.keys() == {"a", 2, 7}
    llm = LLM("fake")
    greedy = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, seed=1)
    (expected,) = llm.generate("Once upon", greedy, use_tqdm=False)
    assert answers["a"]["text"] == expected.outputs[0].text
    assert (answers["a"]["completion_tokens"], answers["a"]["finish_reason"]) == (9, "length")
    assert answers[2]["completion_tokens"] == 5
    assert len(answers[7]["outputs"]) == 2
    assert "3 answered" in result.output


def test_the_second_run_does_what_is_missing(files):
    source, target = files
    write(source, [{"id": i, "prompt": f"p{i}"} for i in range(5)])
    assert run(source, target, "--max-tokens", 4).exit_code == 0
    before = target.read_text()
    again = run(source, target, "--max-tokens", 4)
    assert again.exit_code == 0
    assert "0 answered" in again.output
    assert target.read_text() == before
    lines = before.splitlines(keepends=True)
    target.write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote the third
    resumed = run(source, target, "--max-tokens", 4)
    assert resumed.exit_code == 0
    assert "3 answered" in resumed.output
    assert "2 were there already" in resumed.output
    assert target.read_text().startswith("".join(lines[:2]))
    assert sorted(read(target)) == [0, 1, 2, 3, 4]


def test_wrong_lines_are_reported_and_the_others_answered(files):
    source, target = files
    write(
        source,
        [
            {"id": "good", "prompt": "x"},
            "{not json",
            "[1]",
            {"id": "both", "prompt": "x", "messages": []},
            {"id": "neither"},
            {"id": "good", "prompt": "again"},
            {"id": 1.5, "prompt": "x"},
            {"id": "hot", "prompt": "x", "temperature": -1},
            {"id": "type", "prompt": {"a": 1}},
            {"id": "long", "prompt": "x" * 5000},
            {"id": "empty", "messages": []},
            {"id": "stop", "prompt": "x", "stop": 5},
            {"id": "last", "prompt": "x"},
        ],
    )
    result = run(source, target, "--max-tokens", 3)
    assert result.exit_code == 1
    assert read(target).keys() == {"good", "last"}
    output = " ".join(result.output.split())
    for line in range(2, 13):
        assert f"line {line}:" in output, output
    assert "11 failed" in output
    assert "Traceback" not in output
    write(source, [{"id": "good", "prompt": "x"}, {"id": "hot", "prompt": "x", "temperature": 1}])
    assert run(source, target, "--max-tokens", 3).exit_code == 0, "what has failed is tried again"
    assert read(target).keys() == {"good", "last", "hot"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.jsonl", "out.jsonl"), "does not exist"),
        (("in.jsonl", "in.jsonl"), "must not be the same file"),
        (("in.jsonl", "foreign.txt"), "is not an answer of this command"),
        (("in.jsonl", "out.jsonl", "--temperature", "-1"), "temperature"),
        (("in.jsonl", "out.jsonl", "--dtype", "int3"), "dtype"),
        (("in.jsonl", "no/folder/out.jsonl"), "No such file"),
    ],
)
def test_what_cannot_start_says_why(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", [{"prompt": "x"}])
    (tmp_path / "foreign.txt").write_text("my diary\n")
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert (tmp_path / "foreign.txt").read_text() == "my diary\n"


def test_a_last_line_without_end_is_only_taken_if_it_is_ours(tmp_path):
    answer = json.dumps({"id": "a", "text": "", "outputs": []}) + "\n"
    cut = tmp_path / "cut.jsonl"
    cut.write_text(answer + '{"id": "b", "te')
    assert offline.repair(cut) == {'"a"'}
    assert cut.read_text() == answer
    assert offline.repair(tmp_path / "new.jsonl") == set()
    foreign = tmp_path / "diary.txt"
    foreign.write_text("my diary")
    with pytest.raises(ConfigError, match="line 1"):
        offline.repair(foreign)
    assert foreign.read_text() == "my diary"


def test_the_engine_s_end_ends_the_run(files, monkeypatch):
    from octavo.engine import AsyncLLM
    from octavo.engine.errors import RankLost

    def generate(self, *_, **__):
        async def lost():
            raise RankLost("The engine has failed.")
            yield

        return lost()

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    source, target = files
    write(source, [{"prompt": "x"}] * 3)
    result = run(source, target)
    assert result.exit_code == 1
    assert "The engine has failed." in result.output
