"""What the core tests share: an engine over FakeRunner, and the definition of the tokens it must produce."""

from __future__ import annotations

from collections.abc import Callable

from octavo.engine.core.blocks import BlockPool
from octavo.engine.core.engine import EngineCore
from octavo.engine.core.limits import Limits
from octavo.engine.core.scheduler import Scheduler
from octavo.engine.core.seeds import sequence_seed
from octavo.engine.core.sequence import State
from octavo.engine.params import SamplingParams
from octavo.engine.runner.fake import FakeRunner, VirtualClock, mix
from octavo.engine.types import Request, TokenDelta

VOCAB = 32
EOS = 0


def small_vocab(state: int) -> int:
    """Tokens 0 … 31; one in 32 ends the sequence."""
    return (state >> 7) % VOCAB


def engine(
    *,
    num_blocks: int = 64,
    caching: bool = True,
    lag: int = 1,
    next_token: Callable[[int], int] = small_vocab,
    candidates: Callable[[int], list[tuple[int, float]]] | None = None,
    **limits: object,
) -> EngineCore:
    settings = {
        "block_size": 8,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "vocab_size": VOCAB,
        "eos_token_ids": (EOS,),
    } | limits
    made = Limits(**settings)
    runner = FakeRunner(
        *(num_blocks, made.block_size, next_token),
        sleep=lambda s: None,
        verify=True,
        stages=made.stages,
        candidates=candidates,
    )
    return EngineCore(Scheduler(made, BlockPool(num_blocks, caching)), runner, VirtualClock(), lag)


def request(name: str, prompt: list[int], priority: int = 0, salt: str | None = None, **params: object) -> Request:
    params.setdefault("seed", 7)
    return Request(name, tuple(prompt), SamplingParams(**params), priority=priority, cache_salt=salt)


def expected(
    req: Request, index: int = 0, max_model_len: int = 128, next_token: Callable[[int], int] = small_vocab
) -> list[int]:
    """The output tokens of one sample, from the definition: no scheduler, no blocks."""
    params = req.params
    seed = sequence_seed(params.seed or 0, index)
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    limit = max_model_len - len(req.prompt_token_ids)
    limit = limit if params.max_tokens is None else min(limit, params.max_tokens)
    state = 0
    for token in req.prompt_token_ids:
        state = mix(state, token)
    out: list[int] = []
    while len(out) < limit:
        key = state if params.greedy else mix(state, seed)
        token = next_token(key)
        while len(out) < params.min_tokens and token in stops:
            key = mix(key, token)
            token = next_token(key)
        out.append(token)
        state = mix(state, token)
        if token in stops:
            break
    return out


class Collector:
    """Gathers deltas and checks that nothing follows a finish."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        self.deltas: list[TokenDelta] = []

    def take(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            key = (delta.request_id, delta.index)
            assert key not in self.reasons, f"{key} went on after it had finished"
            self.deltas.append(delta)
            self.tokens.setdefault(key, []).extend(delta.token_ids)
            if delta.finish_reason:
                self.reasons[key] = delta.finish_reason


def check_invariants(core: EngineCore) -> None:
    scheduler = core.scheduler
    pool = scheduler.pool
    pool.check()
    size = scheduler.limits.block_size
    holders: dict[int, int] = {}
    for sequence in scheduler.running:
        assert sequence.state is State.RUNNING
        assert len(sequence.blocks) * size >= sequence.num_computed, "blocks do not cover the computed tokens"
        covered = max(sequence.num_computed, sequence.kv_from)
        assert len(sequence.blocks) * size - covered < size, "a whole block is wasted"
        for block in sequence.blocks:
            holders[block] = holders.get(block, 0) + 1
    assert len({s.slot for s in scheduler.running}) == len(scheduler.running), "a slot is used twice"
    assert pool.num_held == len(holders), "a block is held by nobody"
    assert [s.key for s in scheduler.running] == sorted(s.key for s in scheduler.running)
    assert scheduler.stats().num_waiting >= 0
    assert scheduler.stats().waiting_tokens >= 0


def run(core: EngineCore, collector: Collector, max_steps: int = 5000) -> int:
    """Step until idle; returns the number of steps."""
    for count in range(max_steps):
        if not core.has_work:
            return count
        collector.take(core.step())
        check_invariants(core)
    raise AssertionError(f"still working after {max_steps} steps: something starves")
