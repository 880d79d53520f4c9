"""The sampler: its stages against a naive per-row definition over several steps, alone, in a batch, after a resume."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.core.plan import NewSequence
from octavo.engine.params import SamplingParams
from octavo.engine.runner.philox import uniforms
from octavo.engine.runner.sampler import Sampler
from octavo.engine.runner.sampling_state import SamplingState
from octavo.kernels import ops

VOCAB, SLOTS, MAX_LEN = 97, 8, 64
CPU = torch.device("cpu")
OPS = ops.select(CPU, torch.float32)


@dataclass
class Sequence:
    """A sequence as the test knows it: what is sampled is appended to `tokens`."""

    params: SamplingParams
    prompt: tuple[int, ...]
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    tokens: list[int] = field(default_factory=list)

    def entering(self, slot: int) -> NewSequence:
        known = (*self.prompt, *self.tokens)
        return NewSequence(
            slot, known, len(self.prompt), self.params, self.seed, (), self.stop_token_ids, self.bad_words
        )


class Bench:
    """A sampler with its state and token buffer, driven as the runner drives it."""

    def __init__(self, vocab: int = VOCAB) -> None:
        self.state = SamplingState(SLOTS, MAX_LEN, vocab, CPU)
        self.tokens = torch.zeros((SLOTS, MAX_LEN + 1), dtype=torch.int32)
        self.sampler = Sampler(OPS)
        self.held: dict[int, Sequence] = {}

    def enter(self, slot: int, sequence: Sequence) -> None:
        new = sequence.entering(slot)
        self.state.enter(new)
        self.tokens[slot, : len(new.token_ids)] = torch.tensor(new.token_ids, dtype=torch.int32)
        self.held[slot] = sequence

    def leave(self, slot: int) -> None:
        self.state.leave(slot)
        del self.held[slot]

    def step(self, logits: torch.Tensor, slots: list[int]) -> list:
        positions = [len(self.held[slot].prompt) + len(self.held[slot].tokens) for slot in slots]
        sampled = self.sampler.sample(logits.clone(), slots, positions, self.state, self.tokens)
        self.tokens[slots, positions] = sampled.token_ids.to(torch.int32)
        results = sampled.to_host()
        for slot, token in zip(slots, sampled.token_ids.tolist(), strict=True):
            self.held[slot].tokens.append(token)
        return list(results)


def edited(logits: np.ndarray, sequence: Sequence) -> np.ndarray:
    """The definition of masks, bias and penalties, for one row in float64 (its values rounded to float32)."""
    x, params, output = logits.astype(np.float64), sequence.params, sequence.tokens
    if params.allowed_token_ids:
        x[[token not in params.allowed_token_ids for token in range(len(x))]] = -np.inf
    for *prefix, last in sequence.bad_words:
        if len(prefix) <= len(output) and output[len(output) - len(prefix) :] == prefix:
            x[last] = -np.inf
    if len(output) < params.min_tokens:
        x[list(sequence.stop_token_ids)] = -np.inf
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in set(sequence.prompt) | set(output):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token)
        x[token] -= params.presence_penalty
    return x


def check(token: int, logits: np.ndarray, sequence: Sequence, position: int) -> None:
    """`token` is what the definition draws; `sequence.tokens` does not hold it yet. Edges, where float32 and float64
    may disagree, are given 1e-4; tests/kernels/test_sampling.py has them exactly.
    """
    x, params = edited(logits, sequence), sequence.params
    if params.greedy:
        assert x[token] >= x.max() - 1e-4
        return
    probs = np.exp((x - x.max()) / params.temperature)
    sure, possible = probs >= params.min_p * (1 + 1e-4), probs >= params.min_p * (1 - 1e-4)
    if params.top_k:
        kth = np.sort(x)[::-1][: params.top_k][-1]
        sure, possible = sure & (x > kth + 1e-4), possible & (x >= kth - 1e-4)
    assert possible[token]
    if params.top_p < 1:
        total = probs[possible].sum()
        assert probs[possible & (x > x[token] + 1e-4)].sum() < params.top_p * total * (1 + 1e-4) + 1e-9
        return
    if (sure | ~possible).all():
        cdf = np.cumsum(np.where(sure, probs, 0)) / probs[sure].sum()
        u = uniforms(np.array([sequence.seed], np.uint64), np.array([position]))[0]
        assert cdf[token] >= u - 1e-4
        assert token == 0 or cdf[token - 1] <= u + 1e-4


def params_of_all_kinds(rng: np.random.Generator) -> SamplingParams:
    def maybe(value: object, default: object, chance: float = 0.4) -> object:
        return value if rng.random() < chance else default

    return SamplingParams(
        temperature=float(rng.choice([0.0, 0.5, 1.0, 1.5])),
        top_k=int(rng.choice([0, 1, 3, 20])),
        top_p=float(rng.choice([1.0, 1.0, 0.9, 0.5])),
        min_p=float(rng.choice([0.0, 0.0, 0.05])),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2.0)), 1.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        logit_bias=maybe({int(t): float(rng.uniform(-5, 5)) for t in rng.choice(VOCAB, 5)}, {}),
        allowed_token_ids=maybe(tuple(rng.choice(VOCAB, 30).tolist()), ()),
        min_tokens=maybe(3, 0),
        logprobs=maybe(int(rng.integers(-1, 6)), None, 0.3),
    )


def sequence_of_all_kinds(rng: np.random.Generator) -> Sequence:
    few = rng.choice(VOCAB, 6).tolist()
    words = tuple(tuple(rng.choice(few, rng.integers(1, 4)).tolist()) for _ in range(rng.integers(0, 4)))
    prompt = tuple(rng.integers(0, VOCAB, rng.integers(1, 20)).tolist())
    stops = tuple(rng.choice(VOCAB, 3).tolist())
    return Sequence(params_of_all_kinds(rng), prompt, int(rng.integers(0, 2**63)), stops, words)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_mixed_batches_are_the_definition_over_many_steps(seed: int):
    rng = np.random.default_rng(seed)
    bench = Bench()
    for slot in range(SLOTS):
        bench.enter(slot, sequence_of_all_kinds(rng))
    for _ in range(8):
        slots = sorted(rng.choice(SLOTS, rng.integers(1, SLOTS + 1), replace=False).tolist())
        logits = torch.from_numpy(rng.normal(0, 3, (len(slots), VOCAB)).astype(np.float32))
        results = bench.step(logits, slots)
        for slot, row, result in zip(slots, logits.numpy(), results, strict=True):
            sequence = bench.held[slot]
            token = sequence.tokens.pop()
            if np.isneginf(edited(row, sequence).max()):
                assert result.error is not None
                assert result.token_ids == ()
            else:
                assert result.error is None
                assert result.token_ids == (token,)
                check(token, row, sequence, len(sequence.prompt) + len(sequence.tokens))
                assert len(result.logprobs) == (sequence.params.logprobs is not None)
            sequence.tokens.append(token)
        if rng.random() < 0.3:  # a slot changes hands
            slot = int(rng.integers(SLOTS))
            bench.leave(slot)
            bench.enter(slot, sequence_of_all_kinds(rng))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_a_sequence_alone_draws_what_it_draws_in_a_batch(seed: int):
    rng = np.random.default_rng(seed)
    sequences = [sequence_of_all_kinds(rng) for _ in range(SLOTS)]
    logits = torch.from_numpy(rng.normal(0, 2, (6, SLOTS, VOCAB)).astype(np.float32))
    together = Bench()
    for slot, sequence in enumerate(sequences):
        together.enter(slot, sequence)
    results = [together.step(step, list(range(SLOTS))) for step in logits]
    for i, sequence in enumerate(sequences):
        alone, slot = Bench(), (i + 3) % SLOTS
        alone.enter(slot, Sequence(*(getattr(sequence, n) for n in ("params", "prompt", "seed")), *_lists(sequence)))
        for n, step in enumerate(logits):
            assert alone.step(step[i : i + 1], [slot]) == [results[n][i]]


def _lists(sequence: Sequence) -> tuple:
    return sequence.stop_token_ids, sequence.bad_words


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), when=st.integers(1, 9))
def test_a_resumed_sequence_goes_on_as_if_nothing_had_happened(seed: int, when: int):
    """Preempted after `when` tokens, it enters another slot, which had another owner, with the tokens it has."""
    rng = np.random.default_rng(seed)
    params = params_of_all_kinds(rng).replace(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.3)
    whole = Sequence(params, tuple(rng.integers(0, VOCAB, 9).tolist()), 5, (3, 4), ((7,), (8, 9)))
    other = Sequence(params.replace(temperature=0.9), (1, 2, 3), 6)
    logits = torch.from_numpy(rng.normal(0, 1, (12, 1, VOCAB)).astype(np.float32))
    straight, broken = Bench(), Bench()
    straight.enter(0, whole)
    resumed = Sequence(params, whole.prompt, 5, (3, 4), ((7,), (8, 9)))
    broken.enter(0, resumed)
    broken.enter(2, other)
    for n in range(12):
        if n == when:
            broken.step(logits[n], [2])
            broken.leave(0)
            broken.leave(2)
            broken.enter(2, resumed)
        assert straight.step(logits[n], [0]) == broken.step(logits[n], [2 if n >= when else 0])
    assert whole.tokens == resumed.tokens


def one(params: SamplingParams, logits: list[float], **lists: object) -> Sequence:
    """A sequence of one slot after one step over `logits`."""
    bench = Bench(len(logits))
    sequence = Sequence(params, (0,), 1, **lists)
    bench.enter(0, sequence)
    bench.step(torch.tensor([logits]), [0])
    return sequence


GREEDY = SamplingParams(temperature=0)


def test_min_tokens_masks_every_stop_until_they_are_out():
    bench = Bench(4)
    bench.enter(0, Sequence(GREEDY.replace(min_tokens=2), (0, 0, 0), 1, stop_token_ids=(3, 2)))
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert [bench.step(logits, [0])[0].token_ids for _ in range(3)] == [(1,), (1,), (3,)]


def test_bad_words_match_generated_tokens_only():
    bench = Bench(6)
    bench.enter(0, Sequence(GREEDY, (4,), 1, bad_words=((4, 5), (5, 4, 5), (5, 3))))
    likes_5 = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4, 9.0]])
    likes_4 = torch.tensor([[0.0, 0.1, 0.2, 0.3, 9.0, 0.4]])
    likes_3 = torch.tensor([[0.0, 0.1, 0.2, 9.0, 0.3, 0.4]])
    # (4, 5) does not match at first: its 4 is the prompt's. After a generated 4 it does. (5, 3) after a generated 5.
    steps = [(likes_5, 5), (likes_3, 5), (likes_4, 4), (likes_5, 4), (likes_3, 3)]
    assert [bench.step(logits, [0])[0].token_ids for logits, _ in steps] == [(token,) for _, token in steps]


def test_a_bad_word_may_not_be_unmasked_by_another_with_the_same_end():
    """Of two words that end in one token, one matches and one does not."""
    for words in (((5,), (1, 5)), ((1, 5), (5,))):
        assert one(GREEDY, [0.0, 1.0, 0.0, 0.0, 0.0, 9.0], bad_words=words).tokens == [1]


def test_bias_and_allowed_tokens():
    assert one(GREEDY.replace(logit_bias={2: 5.0}), [0.0, 4.0, 0.0]).tokens == [2]
    assert one(GREEDY.replace(allowed_token_ids=(0, 2)), [0.0, 4.0, 1.0]).tokens == [2]
    # A bias does not bring back what is not allowed.
    assert one(GREEDY.replace(allowed_token_ids=(0,), logit_bias={1: 100.0}), [0.0, 4.0, 1.0]).tokens == [0]


def test_penalties_by_hand():
    """Repetition 2 over prompt and output, then frequency 0.5 and presence 1 over the output."""
    bench = Bench(4)
    params = GREEDY.replace(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=1.0)
    bench.enter(0, Sequence(params, (0,), 1))
    logits = torch.tensor([[8.0, 7.0, 3.0, -1.0]])
    # 0 is of the prompt: 4. 1: 7, then 3.5 - 1.5 = 2, so 0 at 4; 0 then is 4 - 1.5 = 2.5, so 2 at 3; then 0 at 2.5.
    assert [bench.step(logits, [0])[0].token_ids[0] for _ in range(4)] == [1, 0, 2, 0]


def test_penalties_without_repetition_leave_the_prompt_alone():
    bench = Bench(4)
    bench.enter(0, Sequence(GREEDY.replace(presence_penalty=2.0), (1,), 1))
    bench.enter(1, Sequence(GREEDY.replace(repetition_penalty=1.5), tuple([2] * 5), 1))
    logits = torch.tensor([[0.0, 3.0, 2.9, 2.8]] * 2)
    drawn = [[result.token_ids[0] for result in bench.step(logits, [0, 1])] for _ in range(3)]
    assert drawn == [[1, 1], [2, 3], [3, 1]]


def test_lists_of_seen_tokens_outgrow_their_first_size():
    """More distinct tokens than the first storage holds, and more slots than the first storage has."""
    vocab, steps = 700, 600
    state, sampler = SamplingState(12, steps + 8, vocab, CPU), Sampler(OPS)
    tokens = torch.zeros((12, steps + 9), dtype=torch.int64)
    params = GREEDY.replace(presence_penalty=2.0)
    for slot in range(12):
        state.enter(NewSequence(slot, (1,), 1, params, slot, ()))
    drawn = torch.stack(
        [
            sampler.sample(torch.zeros(12, vocab), list(range(12)), [1 + n] * 12, state, tokens).token_ids
            for n in range(steps)
        ]
    )
    assert torch.equal(drawn, torch.arange(steps)[:, None].expand(-1, 12))  # each token once, in order


def test_a_token_drawn_again_and_again_is_listed_once():
    """So the list never outgrows the vocabulary, and a penalty's cost does not grow with the output."""
    state, sampler = SamplingState(1, 1000, 5, CPU), Sampler(OPS)
    state.enter(NewSequence(0, (1, 1, 4), 3, GREEDY.replace(repetition_penalty=1.01), 0, ()))
    tokens = torch.zeros((1, 1001), dtype=torch.int64)
    logits = torch.tensor([[1.0, 2.0, 50.0, 3.0, 0.0]])
    for n in range(700):
        assert sampler.sample(logits.clone(), [0], [3 + n], state, tokens).token_ids.item() == 2
    assert state.penalties._tallies.num_seen[0] == 3
    assert state.penalties._tallies.counts[0].tolist() == [0, 0, 700, 0, 0]
    assert state.penalties._bound[0] <= 5


def test_a_slot_remembers_nothing_of_its_last_owner():
    bench = Bench(4)
    busy = GREEDY.replace(
        repetition_penalty=3.0,
        presence_penalty=2.0,
        logit_bias={3: 50.0},
        allowed_token_ids=(2, 3),
        min_tokens=9,
        logprobs=2,
    )
    bench.enter(0, Sequence(busy, (0, 1), 1, stop_token_ids=(3,), bad_words=((2, 2),)))
    bench.step(torch.randn(1, 4), [0])
    bench.enter(0, Sequence(GREEDY, (0,), 1))  # without a leave between, as after a fork
    (result,) = bench.step(torch.tensor([[9.0, 1.0, 0.0, 2.0]]), [0])
    assert (result.token_ids, result.logprobs) == ((0,), ())
    # Penalties start from nothing as well.
    bench.enter(0, Sequence(GREEDY.replace(presence_penalty=1.0), (0,), 1))
    assert bench.step(torch.tensor([[2.0, 1.5, 1.9, 1.0]]), [0])[0].token_ids == (0,)


def test_stages_nobody_needs_are_not_entered(monkeypatch: pytest.MonkeyPatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("entered")

    bench = Bench()
    for slot in range(4):
        bench.enter(slot, Sequence(GREEDY, (1,), slot))
    bench.enter(4, Sequence(GREEDY.replace(logit_bias={1: 1.0}, presence_penalty=1.0, logprobs=1), (1,), 1))
    monkeypatch.setattr("octavo.engine.runner.sampler._pairs", never)
    monkeypatch.setattr("octavo.engine.runner.philox.uniforms", never)
    bench.sampler = Sampler(replace(OPS, draw=never, take_logprobs=never))
    logits = torch.randn(4, VOCAB)
    assert [r.token_ids[0] for r in bench.step(logits, [0, 1, 2, 3])] == logits.argmax(dim=-1).tolist()
    with pytest.raises(AssertionError, match="entered"):
        bench.step(logits[:1], [4])


@pytest.mark.parametrize(
    ("broken", "params"),
    [
        ([0.0, torch.nan, 1.0], GREEDY),
        ([0.0, torch.nan, 1.0], SamplingParams(top_k=2, top_p=0.9, logprobs=2)),
        ([torch.inf, 0.0, torch.inf], SamplingParams(min_p=0.1)),
        ([-torch.inf] * 3, SamplingParams(logprobs=-1)),
        ([torch.nan] * 3, SamplingParams(top_p=0.5, repetition_penalty=1.5)),
    ],
    ids=str,
)
def test_broken_logits_end_one_row_and_no_other(broken: list[float], params: SamplingParams):
    for logits in (torch.tensor([broken]), torch.tensor([broken]).repeat(1, 8000)):
        vocab = logits.shape[1]
        good = torch.randn(2, vocab, generator=torch.Generator().manual_seed(0))
        results = []
        for rows in (torch.cat([good[:1], logits, good[1:]]), good):
            bench = Bench(vocab)
            for slot in range(3):
                bench.enter(slot, Sequence(params, (0,), slot))
            results.append(bench.step(rows, [0, 1, 2] if len(rows) == 3 else [0, 2]))
        (first, bad, last), undisturbed = results
        assert bad.token_ids == ()
        assert bad.error
        assert [first, last] == undisturbed
        assert first.error is None


def test_masks_that_leave_nothing_are_reported():
    bench = Bench(3)
    bench.enter(0, Sequence(GREEDY.replace(allowed_token_ids=(1,)), (0,), 1, bad_words=((1,),)))
    bench.enter(1, Sequence(SamplingParams(allowed_token_ids=(1,), min_tokens=1), (0,), 1, stop_token_ids=(1,)))
    bench.enter(2, Sequence(GREEDY, (0,), 1))
    first, second, third = bench.step(torch.tensor([[0.0, 1.0, 2.0]] * 3), [0, 1, 2])
    assert "No token is left" in first.error
    assert "No token is left" in second.error
    assert third.token_ids == (2,)


def test_ids_outside_the_vocabulary_are_harmless():
    params = GREEDY.replace(logit_bias={50: 3.0}, allowed_token_ids=(1, 99), min_tokens=2, repetition_penalty=1.1)
    assert one(params, [5.0, 1.0], stop_token_ids=(70,), bad_words=((88,), (1, 90))).tokens == [1]


def test_slots_and_positions_may_be_arrays_and_logits_any_float():
    bench = Bench(5)
    bench.enter(3, Sequence(SamplingParams(), (0,), 1))
    logits = torch.randn(1, 5).bfloat16()
    from_lists = bench.sampler.sample(logits, [3], [1], bench.state, bench.tokens)
    from_arrays = bench.sampler.sample(logits, np.array([3]), np.array([1]), bench.state, bench.tokens)
    assert torch.equal(from_lists.token_ids, from_arrays.token_ids)
    assert from_lists.token_ids.dtype == torch.int64


def test_under_inference_mode():
    with torch.inference_mode():
        bench = Bench()
        for slot in range(4):
            busy = SamplingParams(
                top_p=0.9, repetition_penalty=1.2, logit_bias={1: 1.0}, logprobs=2, temperature=slot / 2
            )
            bench.enter(slot, Sequence(busy, (1, 2), slot, bad_words=((3, 4),)))
        for _ in range(3):
            assert all(result.error is None for result in bench.step(torch.randn(4, VOCAB), [0, 1, 2, 3]))


def test_no_rows():
    sampled = Bench().sampler.sample(torch.zeros(0, VOCAB), [], [], Bench().state, torch.zeros(1, 1))
    assert sampled.to_host() == ()
