"""`octavo chat` against a listening server, as a user types it."""

import io
import socket

import typer
from rich.console import Console
from typer.testing import CliRunner

from octavo.cluster.chat import ChatClient, Said, chat, talk
from octavo.engine.text.byte_tokenizer import ByteTokenizer


def run(typed, *arguments):
    app = typer.Typer()
    app.command()(chat)
    return CliRunner().invoke(app, list(arguments), input=typed)


def prompts(client):
    return [ByteTokenizer().decode(request.prompt_token_ids) for request in client.seen]


def test_a_conversation(harness):
    client = harness.Client(reply_of=lambda request: f"answer {len(client.seen)}")
    with harness.server(client) as url:
        result = run("first\n\nsecond\n", "--url", url, "--system", "Be kind.", "--temperature", "0.5", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert "scripted" in result.output, "the server's first model"
    assert "answer 1" in result.output
    assert prompts(client) == [
        "system\nBe kind.\nuser\nfirst\nassistant\n",
        "system\nBe kind.\nuser\nfirst\nassistant\nanswer 1\nuser\nsecond\nassistant\n",
    ]
    assert (client.seen[0].params.temperature, client.seen[0].params.seed) == (0.5, 3)


def test_thoughts_are_shown_and_left_out_of_the_conversation(harness):
    client = harness.Client(replies=("<think>Hm.</think>Yes.",), step=4)
    with harness.server(client, reasoning_parser="think") as url:
        result = run("one\ntwo\n", "--url", url)
    assert "Hm.\n\nYes." in result.output
    assert prompts(client)[1] == "user\none\nassistant\nYes.\nuser\ntwo\nassistant\n"


def test_commands(harness):
    client = harness.Client()
    with harness.server(client) as url:
        result = run("one\n/reset\n/system Sing.\n/what\ntwo\n/exit\nthree\n", "--url", f"{url}/v1/")
    assert result.exit_code == 0, result.output
    assert prompts(client) == ["user\none\nassistant\n", "system\nSing.\nuser\ntwo\nassistant\n"]
    assert "/reset starts over" in result.output


def test_an_answer_that_fails_leaves_the_conversation_as_it_was(harness):
    client = harness.Client(fail_after=(2, ValueError("hidden")))
    with harness.server(client) as url:
        result = run("one\n", "--url", url, "--max-tokens", "600")
        client.fail_after = None
        again = run("two\n", "--url", url)
    assert result.exit_code == again.exit_code == 0
    assert "max_completion_tokens = 600" in result.output.replace("\n", " ")
    assert prompts(client) == ["user\ntwo\nassistant\n"]


def test_api_key(harness, monkeypatch):
    client = harness.Client()
    with harness.server(client, api_keys=("key",)) as url:
        refused = run("hi\n", "--url", url)
        given = run("hi\n", "--url", url, "--api-key", "key")
        monkeypatch.setenv("OCTAVO_API_KEY", "key")
        from_environment = run("hi\n", "--url", url)
    assert refused.exit_code == 1
    assert "API key" in refused.output
    assert given.exit_code == from_environment.exit_code == 0
    assert len(client.seen) == 2


def test_no_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        result = run("hi\n", "--url", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert result.exit_code == 1
    assert "No server can be reached at" in result.output
    assert "octavo serve" in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_ctrl_c_stops_the_answer_and_not_the_chat(monkeypatch):
    closed, asked = [], []

    class Client(ChatClient):
        def answer(self, body):
            asked.append([message["content"] for message in body["messages"]])
            try:
                yield Said("begun")
                if len(asked) == 1:
                    raise KeyboardInterrupt
            finally:
                closed.append(True)

    lines = iter(["one", KeyboardInterrupt, "two", EOFError])

    def typed(*_):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    console = Console(file=io.StringIO())
    monkeypatch.setattr(console, "input", typed)
    talk(Client("http://127.0.0.1:1", None), {"model": "m"}, None, console)
    assert asked == [["one"], ["one", "begun", "two"]]
    assert closed == [True, True]
    assert "(stopped)" in console.file.getvalue()
