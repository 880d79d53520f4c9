"""LlamaIndex through OpenAILike. Its OpenAI integration wants an older `openai` than ours, so it lives apart: in a
virtual environment that the first run makes, where one process has all the conversations.
"""

import json
import subprocess
from pathlib import Path

import installs
import pytest

HERE = Path(__file__).parent / "llamaindex"
PYTHON_S = 90


@pytest.fixture(scope="module")
def came(server):
    """What each of the conversations came to."""
    python = installs.virtual_environment(HERE) / "bin/python"
    command = [python, HERE / "conversations.py", f"{server}/v1", "actor", "thinker"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PYTHON_S)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("how", ["chat", "complete", "complete_without_chat"])
def test_text(came, how):
    assert came[how] == "You said “Hello!”, and I know no more."


def test_a_stream(came):
    deltas = came["stream_chat"]
    assert len(deltas) > 3
    assert "".join(deltas) == came["chat"]


def test_calls_and_their_results(came):
    calls, text = came["chat_with_tools"]
    assert calls == [["get_weather", {"city": "Paris"}], ["get_weather", {"city": "Oslo"}]]
    assert text == "The tools say: 21 °C in Paris; -3 °C in Oslo."
    assert came["predict_and_call"] == "27 °C in Rome"
    assert came["required"] == ["get_weather"]


@pytest.mark.parametrize("who", ["agent", "thoughtful_agent"])
def test_an_agent(came, who):
    assert came[who] == "The tools say: 21 °C in Paris; 27 °C in Rome."


@pytest.mark.parametrize(
    "how", ["structured_predict", "structured_predict_by_schema", "structured_llm", "streamed_structured_llm"]
)
def test_structured_output(came, how):
    assert came[how] == {"city": "Rome", "celsius": 17}
