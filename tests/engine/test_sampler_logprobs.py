"""Log probabilities and ranks, of drawn tokens and of prompts, against numpy in float64."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.core.plan import NewSequence
from octavo.engine.params import SamplingParams
from octavo.engine.runner import logprobs as module
from octavo.engine.runner.logprobs import prompt_logprobs
from octavo.engine.runner.sampler import Sampler
from octavo.engine.runner.sampling_state import SamplingState
from octavo.engine.types import TokenLogprobs
from octavo.kernels import ops

OPS = ops.select(torch.device("cpu"), torch.float32)


def check(entry: TokenLogprobs, logits: np.ndarray, token: int, k: int) -> None:
    x = logits.astype(np.float64)
    expected = x - x.max() - np.log(np.exp(x - x.max()).sum())
    size = len(x) if k == -1 else min(k, len(x))
    assert entry.token_ids[0] == token
    assert len(entry.token_ids) == len(entry.logprobs) == size + 1
    np.testing.assert_allclose(entry.logprobs, expected[list(entry.token_ids)], atol=2e-5)
    assert entry.rank == 1 + int((logits > logits[token]).sum())
    # The most likely ones: no token twice, descending, none left out that is more likely than the last.
    top = entry.token_ids[1:]
    assert len(set(top)) == size
    assert logits[list(top)].tolist() == np.sort(logits)[::-1][:size].tolist()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 5, 64, 200, 3000]),
    k=st.sampled_from([0, 1, 5, 20, -1]),
    coarse=st.booleans(),
)
def test_prompt_logprobs_are_the_definition(seed: int, vocab: int, k: int, coarse: bool):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 4, (4, vocab)).astype(np.float32))
    logits = logits.bfloat16() if coarse else logits
    targets = torch.from_numpy(rng.integers(0, vocab, 4))
    entries = prompt_logprobs(OPS, logits, targets, k)
    for row, token, entry in zip(logits.float().numpy(), targets.tolist(), entries, strict=True):
        check(entry, row, token, k)


def test_prompt_logprobs_in_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    logits, targets = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)), torch.arange(50)
    whole = prompt_logprobs(OPS, logits, targets, 3)
    for piece in (1, 700, 301 * 49):
        monkeypatch.setattr(module, "_PIECE", piece)
        assert prompt_logprobs(OPS, logits, targets, 3) == whole
    assert prompt_logprobs(OPS, logits[:0], targets[:0], 3) == ()


def sample(logits: torch.Tensor, params: list[SamplingParams]) -> list:
    state = SamplingState(len(params), 16, logits.shape[1], torch.device("cpu"))
    for slot, own in enumerate(params):
        state.enter(NewSequence(slot, (1, 2), 2, own, slot, ()))
    tokens = torch.zeros((len(params), 17), dtype=torch.int32)
    n = len(params)
    return list(Sampler(OPS).sample(logits.clone(), list(range(n)), [2] * n, state, tokens).to_host())


def test_drawn_tokens_carry_raw_logprobs_as_each_row_asked():
    """Raw: no temperature, penalty, bias or mask shows in them, also where every row asks and none needs a copy."""
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(0))
    edits = SamplingParams(temperature=0.3, top_k=3, repetition_penalty=1.9, logit_bias={3: 9.0}, min_p=0.3)
    for asked in ([None, 0, 4, -1, 20, None], [1, 2, 3, 0, 4, 5]):
        for base in (edits, edits.replace(logit_bias={}, repetition_penalty=1.0), SamplingParams(temperature=0)):
            results = sample(logits, [base.replace(logprobs=k) for k in asked])
            for row, k, result in zip(logits.numpy(), asked, results, strict=True):
                if k is None:
                    assert result.logprobs == ()
                else:
                    check(result.logprobs[0], row, result.token_ids[0], k)


def test_logprobs_do_not_depend_on_the_batch():
    logits = torch.randn(5, 5000, generator=torch.Generator().manual_seed(2))
    params = [SamplingParams(logprobs=k, top_p=0.9) for k in (0, 3, 20, 5, 1)]
    together = sample(logits, params)
    for row in range(5):
        state = SamplingState(5, 16, 5000, torch.device("cpu"))
        state.enter(NewSequence(row, (1, 2), 2, params[row], row, ()))
        tokens = torch.zeros((5, 17), dtype=torch.int32)
        alone = Sampler(OPS).sample(logits[row : row + 1].clone(), [row], [2], state, tokens).to_host()
        assert list(alone) == [together[row]]


def test_minus_infinity_and_nan():
    """A token the model excludes is -inf; where the model is broken every log probability is, and none is NaN."""
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, torch.nan, 1.0]])
    sound, broken = prompt_logprobs(OPS, logits, torch.tensor([1, 0]), -1)
    assert sound.logprobs[0] == -math.inf
    assert sound.rank == 3
    assert set(broken.logprobs) == {-math.inf}
    assert "NaN" not in json.dumps([sound.logprobs, broken.logprobs])


def test_candidates_of_ones_own_choice_are_the_definition_and_touch_no_other_row():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(3)) * 4
    logits[2, 7] = -torch.inf
    chosen = [(5,), (), (250, 7, 9, 9), (), tuple(range(0, 300, 3))]
    asked = [SamplingParams(logprobs=2, temperature=0.5, seed=i, logprob_token_ids=ids) for i, ids in enumerate(chosen)]
    asked[3] = SamplingParams(temperature=0.0)
    plain = [own.replace(logprob_token_ids=()) for own in asked]
    for row, (result, without, ids) in enumerate(
        zip(sample(logits, asked), sample(logits, plain), chosen, strict=True)
    ):
        assert result.token_ids == without.token_ids
        if not ids:
            assert result == without
            continue
        (entry,) = result.logprobs
        x = logits[row].double().numpy()
        expected = x - x.max() - np.log(np.exp(x - x.max()).sum())
        assert sorted(entry.token_ids[1:]) == sorted(set(ids))
        np.testing.assert_allclose(entry.logprobs, expected[list(entry.token_ids)], atol=2e-5)
        assert list(entry.logprobs[1:]) == sorted(entry.logprobs[1:], reverse=True)
        assert entry.rank == without.logprobs[0].rank
