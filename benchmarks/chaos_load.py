"""Clients for the chaos benchmark: they know the right answer to every request they send, and time every token.

Knows HTTP. Does not know what is being broken meanwhile. A client behaves as a client library does: what is refused
(429, 503) or whose connection breaks is sent again, until its deadline; an answer that is wrong, or never comes, is
told apart.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

DEADLINE_S = 120.0
# A front that has lost all its ingresses says 404 or 500, too.
REFUSALS = (404, 429, 500, 502, 503, 504)
SILENCE_S = 60.0  # a stream that says nothing for so long hangs


@dataclass(frozen=True, slots=True)
class Question:
    """One request; every answer to it must be the same tokens."""

    prompt: tuple[int, ...]
    params: Mapping[str, Any]


@dataclass(slots=True)
class Asked:
    """What became of one request. Times: time.monotonic()."""

    question: int
    began_at: float
    token_times: list[float] = field(default_factory=list)
    outcome: str = ""  # right, wrong, error, hung, lost
    said: str = ""
    cut_at: list[float] = field(default_factory=list)  # connections that broke under it
    refused: int = 0
    ended_at: float = 0.0


def questions(count: int, vocab_size: int, longest: int, seed: int = 0) -> list[Question]:
    """Greedy and drawn ones, with penalties, with several sequences, with short and long prompts and answers."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        prompt = tuple(draw.randrange(vocab_size) for _ in range(draw.choice((5, 30, 200))))
        params: dict[str, Any] = {"max_tokens": draw.randrange(longest // 8, longest), "ignore_eos": True}
        kind = number % 4
        if kind == 0:
            params["temperature"] = 0
        else:
            params |= {"temperature": 1.0, "seed": number, "top_p": 0.9}
        if kind == 2:
            params |= {"presence_penalty": 0.5, "repetition_penalty": 1.1}
        if kind == 3:
            params["n"] = 2
        made.append(Question(prompt, params))
    return made


class Clients:
    """`concurrency` clients, each with one request at a time, until `stop`."""

    def __init__(self, url: str, model: str, asked: Sequence[Question], answers: Sequence[Any] | None = None) -> None:
        self._url, self._model, self._questions = url, model, asked
        self.answers: list[Any] = list(answers) if answers is not None else [None] * len(asked)
        self.log: list[Asked] = []
        self._stopping = False

    async def learn(self) -> None:
        """Ask everything once, with nobody else there: the right answers."""
        async with httpx.AsyncClient(timeout=None) as http:
            for number in range(len(self._questions)):
                asked = await self._ask(http, number)
                assert asked.outcome == "right", (asked.outcome, asked.said)

    async def run(self, concurrency: int, seed: int = 0) -> None:
        draw = random.Random(seed)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=None, limits=limits) as http:

            async def client() -> None:
                while not self._stopping:
                    await self._ask(http, draw.randrange(len(self._questions)))

            await asyncio.gather(*(client() for _ in range(concurrency)))

    def stop(self) -> None:
        """Requests in progress are still finished."""
        self._stopping = True

    async def _ask(self, http: httpx.AsyncClient, number: int) -> Asked:
        asked = Asked(number, time.monotonic())
        self.log.append(asked)
        while not asked.outcome:
            try:
                async with asyncio.timeout(DEADLINE_S - (time.monotonic() - asked.began_at)):
                    await self._try(http, asked)
            except TimeoutError:
                asked.outcome = "lost"
        asked.ended_at = time.monotonic()
        return asked

    async def _try(self, http: httpx.AsyncClient, asked: Asked) -> None:
        question = self._questions[asked.question]
        body = {"model": self._model, "prompt": list(question.prompt), "stream": True, "return_token_ids": True}
        got: dict[int, list[int]] = {}
        ends: dict[int, str] = {}
        n = question.params.get("n", 1)
        try:
            async with http.stream("POST", f"{self._url}/v1/completions", json=body | dict(question.params)) as reply:
                if reply.status_code in REFUSALS:
                    asked.said = f"{reply.status_code} {(await reply.aread()).decode(errors='replace')[:200]}"
                    asked.refused += 1
                    await asyncio.sleep(min(2.0, float(reply.headers.get("retry-after", 0.3))))
                    return
                lines = reply.aiter_lines()
                while True:
                    try:
                        line = await asyncio.wait_for(anext(lines), SILENCE_S)
                    except StopAsyncIteration:
                        break
                    except TimeoutError:
                        asked.outcome = "hung"
                        return
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        asked.outcome, asked.said = "error", line[:300]
                        return
                    for choice in event["choices"]:
                        got.setdefault(choice["index"], []).extend(choice.get("token_ids") or ())
                        if choice.get("finish_reason"):
                            ends[choice["index"]] = choice["finish_reason"]
                    asked.token_times.append(time.monotonic())
        except httpx.HTTPError as error:
            asked.said = repr(error)
        if len(ends) < n:  # the connection broke
            asked.cut_at.append(time.monotonic())
            await asyncio.sleep(0.2)
            return
        answer = [(got.get(i, []), ends[i]) for i in range(n)]
        if self.answers[asked.question] is None:
            self.answers[asked.question] = answer
        asked.outcome = "right" if answer == self.answers[asked.question] else "wrong"
        if asked.outcome == "wrong":
            asked.said = _difference(answer, self.answers[asked.question])


def _difference(got: Sequence[Any], want: Sequence[Any]) -> str:
    for index, ((tokens, end), (right, right_end)) in enumerate(zip(got, want, strict=True)):
        common = zip(tokens, right, strict=False)
        at = next((i for i, (a, b) in enumerate(common) if a != b), min(len(tokens), len(right)))
        if tokens != right or end != right_end:
            return f"sequence {index} differs from token {at} of {len(right)} on (got {len(tokens)}, {end})"
    return "equal"
