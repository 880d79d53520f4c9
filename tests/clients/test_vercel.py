"""The Vercel AI SDK on Node, through @ai-sdk/openai-compatible. One process has all the conversations."""

import json
import shutil
import subprocess
from pathlib import Path

import installs
import pytest

HERE = Path(__file__).parent / "vercel"
NODE_S = 60
pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or shutil.which("npm") is None, reason="the Vercel AI SDK needs Node 18 and npm"
)


@pytest.fixture(scope="module")
def came(server):
    """What each of the conversations came to."""
    folder = installs.node_modules(HERE)
    shutil.copy(HERE / "conversations.mjs", folder)  # packages are looked for beside it
    command = ["node", "conversations.mjs", f"{server}/v1", "actor", "thinker", "fake"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NODE_S)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_text(came):
    said = came["text"]
    assert (said["text"], said["finishReason"]) == ("You said “Hello!”, and I know no more.", "stop")
    assert said["usage"]["outputTokens"] == len(said["text"].encode()) + 1


def test_tools_over_several_steps(came):
    talk = came["tools"]
    calls = [["get_weather", {"city": "Paris"}], ["get_weather", {"city": "Rome"}]]
    assert talk["steps"] == [{"finishReason": "tool-calls", "calls": calls}, {"finishReason": "stop", "calls": []}]
    assert talk["text"] == "The tools say: 21 °C in Paris; 27 °C in Rome."


def test_tools_in_a_stream(came):
    talk = came["streamedTools"]
    assert talk["text"] == "The tools say: -3 °C in Oslo."
    call = ["tool-input-start", "tool-input-delta", "tool-input-end", "tool-call", "tool-result"]
    text = ["text-start", "text-delta", "text-end"]
    steps = [["start-step", *parts, "finish-step"] for parts in (call, text)]
    assert talk["parts"] == ["start", *steps[0], *steps[1], "finish"]
    assert talk["finishReason"] == "stop"
    assert talk["usage"]["outputTokens"] > len(talk["text"])


def test_a_tool_that_fails_is_told_to_the_model(came):
    assert came["failingTool"]["text"] == "The tools say: no network."


@pytest.mark.parametrize("how", ["object", "streamedObject"])
def test_objects(came, how):
    assert came[how]["object"] == {"city": "Rome", "celsius": 17, "sky": "sunny"}
    assert came[how].get("partials", 2) > 1


def test_tools_and_then_an_object(came):
    assert came["toolsThenObject"] == {"object": {"city": "Rome", "celsius": 27, "sky": "sunny"}, "steps": 2}


def test_a_call_that_is_required(came):
    assert came["required"]["calls"] == [["get_weather", {"city": "Rome"}]]


def test_thoughts(came):
    talk = came["thoughts"]
    assert (talk["text"], talk["steps"]) == ("The tools say: 27 °C in Rome.", 2)
    assert talk["reasoningText"] == "What do I know about the weather?"
    assert talk["streamed"] == ["You said “Hello!”, and I know no more.", talk["reasoningText"]]
    assert talk["object"]["celsius"] == 17


def test_a_refusal_names_the_field(came):
    refusal = came["refusal"]
    assert (refusal["name"], refusal["status"]) == ("AI_APICallError", 400)
    assert "temperature" in refusal["message"]


def test_a_stream_that_is_aborted_ends_at_the_engine(came, actor):
    assert came["aborted"] == {"seen": 3}
    assert len(actor.aborted) > 0


def test_embeddings(came):
    one, two, again = came["embeddings"]["embeddings"]
    assert one == again != two
    assert came["embeddings"]["usage"] == {"tokens": 12}
