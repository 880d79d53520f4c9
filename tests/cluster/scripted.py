"""EngineClient without an engine: what it answers is known beforehand, and what it was asked is kept."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from octavo.cluster.observability.traces import NO_JOURNEY, Journey
from octavo.engine.params import SamplingParams
from octavo.engine.text.byte_tokenizer import EOS, ByteTokenizer
from octavo.engine.types import EngineInfo, EngineStats, Request, TokenDelta, TokenLogprobs

INFO = EngineInfo(
    model="scripted",
    max_model_len=512,
    vocab_size=261,
    eos_token_ids=(EOS,),
    dtype="none",
    device="none",
    block_size=16,
    num_blocks=64,
)


def logprobs_of(token: int, top: int) -> TokenLogprobs:
    """The drawn token is the second likeliest: -1.0; the others are -0.5, -1.5, -2.5 …"""
    others = [(token + 1) % 256, token, *((token + 2 + i) % 256 for i in range(20))]
    values = [-0.5, -1.0, *(-1.5 - i for i in range(20))]
    return TokenLogprobs((token, *others[:top]), (-1.0, *values[:top]), 2)


def entry_of(token: int, params: SamplingParams) -> TokenLogprobs:
    chosen = params.logprob_token_ids
    if chosen:
        return TokenLogprobs((token, *chosen), (-1.0, *(-2.0 - i for i in range(len(chosen)))), 2)
    return logprobs_of(token, params.logprobs or 0)


@dataclass
class ScriptedClient:
    """EngineClient whose sequence i answers `replies[i % len]`, `step` bytes a time, and ends. No clock, no threads."""

    replies: tuple[str, ...] = ("Hello, world",)
    step: int = 1
    delay_s: float = 0.0
    fail: BaseException | None = None  # raised instead of the first delta
    fail_after: tuple[int, BaseException | TokenDelta] | None = None  # instead of the delta of that number
    reply_of: Callable[[Request], str] | None = None
    hang_after: int | None = None  # tokens after which nothing comes any more
    info_value: EngineInfo = INFO
    stats_value: list[EngineStats] = field(default_factory=lambda: [EngineStats(num_running=1, generation_tokens=1)])
    seen: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    live: int = 0

    async def info(self) -> EngineInfo:
        return self.info_value

    async def stats(self) -> dict[str, EngineStats]:
        return {f"replica-{number}": stats for number, stats in enumerate(self.stats_value)}

    async def generate(self, request: Request, journey: Journey = NO_JOURNEY) -> AsyncGenerator[TokenDelta, None]:
        self.seen.append(request)
        self.live += 1
        finished = False
        try:
            if self.fail is not None:
                raise self.fail
            scripts = [self._script(request, index) for index in range(request.params.n)]
            number = 0
            while scripts:
                for script in list(scripts):
                    await asyncio.sleep(self.delay_s)
                    if self.hang_after is not None and number >= self.hang_after:
                        await asyncio.Event().wait()
                    if self.fail_after is not None and number >= self.fail_after[0]:
                        if isinstance(self.fail_after[1], BaseException):
                            raise self.fail_after[1]
                        yield self.fail_after[1]
                    number += 1
                    delta = script.pop(0)
                    if not script:
                        scripts.remove(script)
                    finished = not scripts
                    yield delta
        finally:
            self.live -= 1
            if not finished:
                self.aborted.append(request.request_id)

    def _script(self, request: Request, index: int) -> list[TokenDelta]:
        params = request.params
        reply = self.reply_of(request) if self.reply_of else self.replies[index % len(self.replies)]
        tokens = [*ByteTokenizer().encode(reply, add_special_tokens=False), EOS]
        assert params.max_tokens is not None
        reason = "stop" if len(tokens) <= params.max_tokens else "length"
        tokens = tokens[: params.max_tokens]
        deltas = []
        for at in range(0, len(tokens), self.step):
            some = tuple(tokens[at : at + self.step])
            last = at + self.step >= len(tokens)
            prompt_logprobs = None
            if at == index == 0 and params.prompt_logprobs is not None:
                rest = [logprobs_of(token, params.prompt_logprobs) for token in request.prompt_token_ids[1:]]
                prompt_logprobs = (None, *rest)
            deltas.append(
                TokenDelta(
                    request.request_id,
                    index,
                    some,
                    () if params.logprobs is None else tuple(entry_of(token, params) for token in some),
                    reason if last else None,
                    num_cached_tokens=3,
                    prompt_logprobs=prompt_logprobs,
                )
            )
        return deltas
