"""FakeRunner: stands in for a model wherever the core, the server or a cluster is run without one. No torch.

Its next token is a function of all tokens before it, so a wrong token anywhere changes everything after. It also keeps
a shadow of the KV pool: each slot of a block remembers which prefix its KV was computed from, and with `verify` every
row checks that what its block table leads to is its own prefix. A scheduling or block fault thus shows as an
AssertionError, not as noise.
"""

from __future__ import annotations

import os
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.engine.core.plan import MaskSource, Row, RowResult, StepPlan, StepResult, TokenMasks
from octavo.engine.errors import ConfigError
from octavo.engine.params import SamplingParams
from octavo.engine.pooling.params import PoolingParams
from octavo.engine.runner.fake_choice import choose
from octavo.engine.types import RankStatus, TokenLogprobs

_MASK = (1 << 64) - 1
FAKE_EMBEDDING = 8


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds that a step takes: fixed + per computed token + per KV position read."""

    step_s: float = 0.0
    token_s: float = 0.0
    kv_position_s: float = 0.0

    def seconds(self, plan: StepPlan) -> float:
        positions = sum(row.start + row.num_tokens for row in plan.rows)
        return self.step_s + self.token_s * plan.num_tokens + self.kv_position_s * positions


def cost_of(model: str) -> CostModel:
    """How slow a fake model is by its name: `fake`, `fake:step_ms=20`, `fake:step_ms=20,token_us=50,kv_position_ns=20`.

    Raises ConfigError for what is no such name.
    """
    costs = {"step_ms": 1.0, "token_us": 0.0, "kv_position_ns": 0.0}
    for part in filter(None, model.removeprefix("fake").removeprefix(":").split(",")):
        name, _, value = part.partition("=")
        if name not in costs or not value.replace(".", "", 1).isdecimal():
            raise ConfigError(f"{part!r} is no cost of a fake model: write {', '.join(costs)} = a number.")
        costs[name] = float(value)
    return CostModel(costs["step_ms"] * 1e-3, costs["token_us"] * 1e-6, costs["kv_position_ns"] * 1e-9)


class VirtualClock:
    """A clock that only moves when told to. Seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def spell(state: int) -> int:
    """A token of the byte tokenizer that reads as text: mostly lower-case letters, some spaces."""
    pick = state % 32
    return 32 if pick >= 26 else 97 + pick


def mix(state: int, token: int) -> int:
    """The state after one more token (64-bit FNV-like mixing; only determinism and spread matter)."""
    state = ((state ^ (token + 0x9E3779B97F4A7C15)) * 0xFF51AFD7ED558CCD) & _MASK
    return state ^ (state >> 29)


@dataclass(slots=True)
class _Slot:
    """A sequence on the fake rank. `states[p]` summarises the tokens of positions 0 … p."""

    tokens: list[int]
    states: list[int]
    table: list[int]
    params: SamplingParams
    seed: int
    num_prompt: int
    stop_token_ids: tuple[int, ...]
    pooling: PoolingParams | None = None
    seen: set[int] = field(default_factory=set)  # positions computed here, for pooling


class FakeRunner:
    """Executes plans without a model; a `Process` by itself (see core/engine.py).

    next_token: state → token, by default readable letters. Sampled requests mix their seed into the state.
    sleep: what to do for the step's seconds (time.sleep, VirtualClock.sleep, or nothing).
    verify: check the shadow KV of every position of every row, O(context).
    stages: of the pipeline it stands for: with more than one, a token it draws is there only once a plan brings it.
    candidates: state → (token, log probability) of all tokens, the likeliest first, in place of made-up ones.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        next_token: Callable[[int], int] = spell,
        cost: CostModel | None = None,
        sleep: Callable[[float], None] = time.sleep,
        verify: bool = False,
        stages: int = 1,
        candidates: Callable[[int], list[tuple[int, float]]] | None = None,
    ) -> None:
        self._block_size = block_size
        self._next_token = next_token
        self._cost = cost or CostModel()
        self._sleep = sleep
        self._verify = verify
        self._stages = stages
        self._candidates = candidates
        self._slots: dict[int, _Slot] = {}
        self._kv: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._launched: deque[StepPlan] = deque()
        self._masks = _Masks()
        self._done: deque[StepResult] = deque()

    def launch(self, plan: StepPlan) -> None:
        self._launched.append(plan)
        self._go_on()

    def constrain(self, masks: TokenMasks) -> None:
        self._masks.put(masks)
        self._go_on()

    def collect(self) -> StepResult:
        result = self._done.popleft()
        if result.seconds:
            self._sleep(result.seconds)
        return result

    def check(self) -> None:
        """Nothing can be lost."""

    def ranks(self) -> tuple[RankStatus, ...]:
        return (RankStatus(rank=0, stage=0, tp_rank=0, pid=os.getpid()),)

    def close(self) -> None:
        self._slots.clear()

    def _go_on(self) -> None:
        """Execute what was launched, up to a plan whose masks are not there."""
        while self._launched and (self._launched[0].step_id in self._masks or not _is_masked(self._launched[0])):
            plan = self._launched.popleft()
            self._done.append(self.execute(plan, self._masks))

    def execute(self, plan: StepPlan, masks: MaskSource | None = None) -> StepResult:
        """masks: None on a rank that does not draw tokens."""
        for slot in plan.released:
            del self._slots[slot]
        for new in plan.new:
            assert new.slot not in self._slots, f"slot {new.slot} is taken"
            self._slots[new.slot] = _Slot(
                tokens=list(new.token_ids),
                states=[],
                table=list(new.blocks),
                params=new.params,
                seed=new.seed,
                num_prompt=new.num_prompt,
                stop_token_ids=new.stop_token_ids,
                pooling=new.pooling,
            )
        for slot, position, token in plan.known:
            tokens = self._slots[slot].tokens
            del self._slots[slot].states[position:]
            assert position <= len(tokens), f"slot {slot}: a token for {position}, but {len(tokens)} are here"
            tokens[position:] = [token]  # in place of the one drawn here, if any: a beam's is chosen elsewhere
        for slot, index, block in plan.table_edits:
            table = self._slots[slot].table
            table[index : index + 1] = [block]
        for source, destination in plan.copies:
            self._kv[destination] = list(self._kv[source])
        for row in plan.rows:
            self._write_kv(row)
        given = iter(masks.take(plan.step_id).rows if masks is not None and _is_masked(plan) else ())
        results = tuple(self._compute(row, next(given, b"") if row.masked else b"") for row in plan.rows)
        return StepResult(plan.step_id, results, self._cost.seconds(plan))

    def _write_kv(self, row: Row) -> None:
        slot = self._slots[row.slot]
        end = row.start + row.num_tokens
        assert end <= len(slot.tokens), f"row to {end}, but only {len(slot.tokens)} tokens are here"
        for position in range(len(slot.states), end):
            previous = slot.states[position - 1] if position else 0
            slot.states.append(mix(previous, slot.tokens[position]))
        for position in range(max(row.start, row.write_from), end):
            block, offset = divmod(position, self._block_size)
            self._kv[slot.table[block]][offset] = slot.states[position]

    def _compute(self, row: Row, mask: bytes) -> RowResult:
        slot = self._slots[row.slot]
        end = row.start + row.num_tokens
        if self._verify:
            for position in range(end):
                block, offset = divmod(position, self._block_size)
                found = self._kv[slot.table[block]][offset]
                assert found == slot.states[position], f"slot {row.slot}: foreign KV at position {position}"
        prompt: tuple[TokenLogprobs, ...] = ()
        if row.prompt_logprobs is not None:
            last = min(end, slot.num_prompt - 1)
            prompt = tuple(_logprobs(slot.tokens[p + 1], row.prompt_logprobs) for p in range(row.start, last))
        if slot.pooling is not None:
            slot.seen.update(range(row.start, end))
            return RowResult(pooled=_pool(slot)) if end == slot.num_prompt else RowResult()
        if not row.samples:
            return RowResult(prompt_logprobs=prompt)
        key = slot.states[end - 1] if slot.params.greedy else mix(slot.states[end - 1], slot.seed)
        token = self._next_token(key)
        while end - slot.num_prompt < slot.params.min_tokens and token in slot.stop_token_ids:
            key = mix(key, token)
            token = self._next_token(key)
        if mask:
            num_output = end - slot.num_prompt
            never = slot.stop_token_ids if num_output < slot.params.min_tokens else ()
            token = choose(key, mask, token, num_output, slot.stop_token_ids, never)
            if token < 0:
                return RowResult(error="No token is left to draw: the masks exclude them all.")
        del slot.tokens[end:]
        if self._stages == 1:
            slot.tokens.append(token)
        wanted = slot.params.logprobs
        logprobs = () if wanted is None else (self._scores(slot, slot.states[end - 1], token, wanted),)
        return RowResult((token,), logprobs, prompt)

    def _scores(self, slot: _Slot, state: int, token: int, count: int) -> TokenLogprobs:
        if chosen := slot.params.logprob_token_ids:
            return TokenLogprobs((token, *chosen), (-0.5, *(-1.0 - i for i in range(len(chosen)))), 1)
        if self._candidates is None:
            return _logprobs(token, count)
        found = self._candidates(state)
        values = dict(found)
        tokens, best = zip(*found[: None if count < 0 else count], strict=True)
        return TokenLogprobs((token, *tokens), (values[token], *best), 1 + list(values).index(token))


class _Masks:
    """Masks that have come, by step: a MaskSource."""

    def __init__(self) -> None:
        self._come: dict[int, TokenMasks] = {}

    def __contains__(self, step_id: int) -> bool:
        return step_id in self._come

    def put(self, masks: TokenMasks) -> None:
        self._come[masks.step_id] = masks

    def take(self, step_id: int) -> TokenMasks:
        return self._come.pop(step_id)


def _is_masked(plan: StepPlan) -> bool:
    return any(row.masked for row in plan.rows)


def _pool(slot: _Slot) -> bytes:
    """Made-up numbers, a function of the pooled positions and all before them. They were all computed in this slot."""
    assert slot.pooling is not None
    kind, last = slot.pooling.pooling_type, slot.num_prompt - 1
    wanted = {"last": {last}, "cls": {0}, "mean": set(range(slot.num_prompt))}[kind or "last"]
    assert wanted <= slot.seen, f"{kind} needs positions that were never computed: {sorted(wanted - slot.seen)}"
    state = 0
    for position in sorted(wanted):
        state = mix(slot.states[position], state & 0xFFFF)
    values = [((state >> (8 * i)) & 0xFF) / 255 - 0.5 for i in range(FAKE_EMBEDDING)]
    length = sum(value * value for value in values) ** 0.5 if slot.pooling.normalize else 1.0
    size = slot.pooling.dimensions or FAKE_EMBEDDING
    return struct.pack(f"<{size}f", *(value / (length or 1.0) for value in values[:size]))


def _logprobs(token: int, count: int) -> TokenLogprobs:
    """Made-up log probabilities: the token itself is the most likely one, then its neighbours."""
    others = range(1, max(1, count))
    return TokenLogprobs(
        token_ids=(token, *([token] if count else ()), *((token + i) % 256 for i in others)),
        logprobs=(-0.5, *([-0.5] if count else ()), *(-1.0 - i for i in others)),
        rank=1,
    )
