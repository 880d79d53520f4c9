"""`octavo chat`: a conversation in the terminal with a running server.

Speaks OpenAI's HTTP API and nothing else, so it talks to any server that does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.markup import escape

from octavo.engine import env

COMMANDS = "/reset starts over · /system TEXT sets the system message · /exit or Ctrl-D leaves · Ctrl-C stops an answer"
CONNECT_S = 5.0
ANSWER_S = 600.0  # longest silence of a server that has accepted the request


class ServerError(Exception):
    """The server refused, or cannot be reached. The message is for the user."""


@dataclass(slots=True)
class Conversation:
    """The turns so far, as the API takes them."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.turns]


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of an answer. is_thought: of what the model thinks before it."""

    text: str
    is_thought: bool = False


class ChatClient:
    """The two calls that a conversation needs. Raises ServerError."""

    def __init__(self, url: str, api_key: str | None, transport: httpx.BaseTransport | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
        base = url.rstrip("/").removesuffix("/v1")
        self.url = base if "://" in base else f"http://{base}"
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, transport=transport)
        except httpx.InvalidURL as error:
            raise ServerError(f"{url!r} is not a URL: {error}.") from None

    def close(self) -> None:
        self._http.close()

    def first_model(self) -> str:
        """The first model that the server serves."""
        try:
            response = self._http.get("/v1/models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        _raise_for(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise ServerError(f"What answers at {self.url} is not an OpenAI-compatible server with a model.") from None

    def answer(self, body: dict[str, Any]) -> Iterator[Said]:
        """The answer, as it comes. Closing the iterator ends the request."""
        try:
            with self._http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
                if response.is_error:
                    response.read()
                _raise_for(response)
                yield from _texts(response.iter_lines())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: httpx.HTTPError) -> ServerError:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol):
            return ServerError(
                f"No server can be reached at {self.url}: start one with `octavo serve`, or give its --url."
            )
        return ServerError(f"The connection to {self.url} was lost: {error or type(error).__name__}.")


def chat(
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(help="API key; default: OCTAVO_API_KEY.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name; default: the server's first.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy; default: the server's.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
) -> None:
    """Talk to a running server in the terminal."""
    console = Console()
    options = {"temperature": temperature, "top_p": top_p, "max_completion_tokens": max_tokens, "seed": seed}
    try:
        with closing(ChatClient(url, api_key or env.api_key())) as client:
            name = model or client.first_model()
            console.print(f"[bold]{escape(name)}[/bold] at {escape(client.url)}. [dim]{COMMANDS}[/dim]")
            talk(
                client,
                {"model": name, **{key: value for key, value in options.items() if value is not None}},
                system,
                console,
            )
    except ServerError as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(1) from None


def talk(client: ChatClient, body: dict[str, Any], system: str | None, console: Console) -> None:
    """Ask, answer, and so on, until the user leaves."""
    conversation = Conversation(system)
    while True:
        try:
            line = console.input("[bold cyan]you ›[/bold cyan] ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:  # an unfinished line is thrown away, as in a shell
            console.print()
            continue
        if line in ("/exit", "/quit"):
            return
        if line.startswith("/"):
            console.print(f"[dim]{escape(_command(line, conversation))}[/dim]")
        elif line:
            _turn(client, body, conversation, line, console)


def _command(line: str, conversation: Conversation) -> str:
    name, _, argument = line.partition(" ")
    if name == "/reset":
        conversation.turns.clear()
        return "The conversation starts over."
    if name == "/system":
        conversation.system = argument.strip() or None
        return "The system message is set." if conversation.system else "There is no system message now."
    return COMMANDS


def _turn(client: ChatClient, body: dict[str, Any], conversation: Conversation, line: str, console: Console) -> None:
    conversation.turns.append({"role": "user", "content": line})
    parts: list[str] = []
    try:
        with closing(client.answer({**body, "messages": conversation.messages()})) as answer:  # type: ignore[type-var]
            was_thought = False
            for said in answer:
                if not said.is_thought:
                    parts.append(said.text)
                    console.out("\n\n" if was_thought else "", end="")
                console.out(said.text, end="", highlight=False, style="dim" if said.is_thought else None)
                was_thought = said.is_thought
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    except ServerError as error:
        console.print(f"[red]{escape(str(error))}[/red]", end="")
    console.print()
    if parts:
        conversation.turns.append({"role": "assistant", "content": "".join(parts)})
    else:
        conversation.turns.pop()  # unanswered: as if it had not been asked


def _texts(lines: Iterator[str]) -> Iterator[Said]:
    """The pieces of text in a stream of server-sent events."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ServerError(event["error"].get("message", "The server failed."))
        for choice in event.get("choices", ()):
            delta = choice["delta"]
            if thought := delta.get("reasoning_content") or delta.get("reasoning"):
                yield Said(thought, is_thought=True)
            if text := delta.get("content"):
                yield Said(text)
    raise ServerError("The server ended the answer early.")


def _raise_for(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"The server answered {response.status_code} {response.reason_phrase}."
    raise ServerError(message)
