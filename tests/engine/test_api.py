"""LLM and AsyncLLM as users call them, on the real default model in float32."""

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from octavo.engine import LLM, AsyncLLM, EngineConfig, SamplingParams
from octavo.engine.errors import ConfigError, RequestError, StepError
from octavo.engine.loader.gguf import GGUFCheckpoint

# As floats, so that tokens can be compared with transformers'.
OPTIONS = {
    "dtype": "float32",
    "quantization": "none",
    "max_model_len": 512,
    "max_num_seqs": 32,
    "num_gpu_blocks_override": 200,
}
TEXTS = [
    "The capital of France is",
    "Water boils at",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "def fibonacci(n):\n",
    "1, 2, 3, 4,",
]
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm(smollm2: Path):
    made = LLM(str(smollm2), **OPTIONS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def reference(smollm2: Path):
    """transformers' model with the same weights."""
    checkpoint = GGUFCheckpoint(smollm2)
    model = LlamaForCausalLM(checkpoint.config).eval()
    model.load_state_dict(dict(checkpoint.float_tensors()), strict=False)
    model.tie_weights()
    return model


def texts(outputs):
    return [[c.text for c in output.outputs] for output in outputs]


def test_greedy_text_equals_transformers(llm, reference):
    tokenizer = llm.get_tokenizer()
    expected = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.inference_mode():
            out = reference.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=list(llm.info.eos_token_ids))
        expected.append(out[0, ids.shape[1] :].tolist())
    outputs = llm.generate(TEXTS, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == expected
    assert "Paris" in outputs[0].outputs[0].text
    for output in outputs:
        completion = output.outputs[0]
        shown = [t for t in completion.token_ids if t not in llm.info.eos_token_ids]
        assert completion.text == tokenizer.decode(shown)
        assert output.finished
        assert output.metrics.first_token_time <= output.metrics.finished_time


def test_logprobs_equal_transformers(llm, reference):
    params = GREEDY.replace(logprobs=3, prompt_logprobs=2, max_tokens=8)
    (output,) = llm.generate(TEXTS[2], params, use_tqdm=False)
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    num_prompt = len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    for position in range(1, len(ids)):
        entry = (
            output.prompt_logprobs[position]
            if position < num_prompt
            else output.outputs[0].logprobs[position - num_prompt]
        )
        assert entry[ids[position]].logprob == pytest.approx(expected[position - 1, ids[position]].item(), abs=2e-3)
        best = max(entry.values(), key=lambda item: item.logprob)
        assert best.rank == 1
        assert best.logprob == pytest.approx(expected[position - 1].max().item(), abs=2e-3)
    total = sum(e[t].logprob for e, t in zip(output.outputs[0].logprobs, ids[num_prompt:], strict=True))
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)


def test_a_seed_gives_the_same_tokens_alone_in_a_crowd_preempted_and_elsewhere(llm, smollm2):
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=40, ignore_eos=True)
    alone = llm.generate(TEXTS[2], params, use_tqdm=False)[0].outputs[0].token_ids
    crowd = [params.replace(seed=i) for i in range(12)]
    together = llm.generate([TEXTS[2]] * 12, crowd, use_tqdm=False)
    assert together[11].outputs[0].token_ids == alone
    assert len({tuple(o.outputs[0].token_ids) for o in together}) > 6
    small = LLM(str(smollm2), **OPTIONS | {"num_gpu_blocks_override": 20, "max_model_len": 128})
    try:
        pressed = small.generate([TEXTS[2]] * 12, crowd, use_tqdm=False)
        assert small.stats().preemptions > 0
    finally:
        small.close()
    assert [o.outputs[0].token_ids for o in pressed] == [o.outputs[0].token_ids for o in together]


def test_samples_of_one_request(llm):
    (output,) = llm.generate(TEXTS[2], SamplingParams(n=3, seed=5, max_tokens=12, ignore_eos=True), use_tqdm=False)
    samples = [tuple(c.token_ids) for c in output.outputs]
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len(set(samples)) == 3
    first = llm.generate(TEXTS[2], SamplingParams(seed=5, max_tokens=12, ignore_eos=True), use_tqdm=False)[0]
    assert tuple(first.outputs[0].token_ids) == samples[0]


def test_stop_strings_tokens_and_lengths(llm):
    plain = llm.generate(TEXTS[0], GREEDY, use_tqdm=False)[0].outputs[0]
    stopped = llm.generate(TEXTS[0], GREEDY.replace(stop=("aris",)), use_tqdm=False)[0].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", "aris")
    assert stopped.text == plain.text[: plain.text.index("aris")]
    token = plain.token_ids[2]
    by_token = llm.generate(TEXTS[0], GREEDY.replace(stop_token_ids=(token,)), use_tqdm=False)[0].outputs[0]
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", token)
    assert by_token.token_ids == plain.token_ids[:3]
    assert llm.generate(TEXTS[0], GREEDY.replace(max_tokens=3), use_tqdm=False)[0].outputs[0].finish_reason == "length"
    assert llm.stats().kv_blocks_held == 0


def test_a_repeated_prompt_is_cached(llm):
    prompt = llm.get_tokenizer().encode("A prompt that nobody has sent before. " * 12)
    first = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
    again = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens == len(prompt) // 16 * 16
    assert texts([first]) == texts([again])


def test_chat(llm):
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    one = llm.chat(conversation, GREEDY, use_tqdm=False)
    two = llm.chat([conversation, conversation], GREEDY, use_tqdm=False)
    assert texts(two) == [texts(one)[0]] * 2
    assert "Paris" in one[0].outputs[0].text


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        ("", GREEDY, "empty"),
        ([[]], GREEDY, "empty"),
        ([list(range(600))], GREEDY, "600 tokens.*512"),
        ([[1, 2, 10**6]], GREEDY, "outside"),
        ([3.5], GREEDY, "string or a list of token ids"),
        (["a", "b"], [GREEDY], "1 SamplingParams were given for 2 prompts"),
    ],
)
def test_bad_input_is_refused_and_loses_nothing(llm, prompts, params, words):
    with pytest.raises(RequestError, match=words):
        llm.generate(prompts, params, use_tqdm=False)
    assert not llm._engine.core.has_work
    assert llm.generate(TEXTS[0], GREEDY, use_tqdm=False)[0].finished


def test_what_the_masks_leave_nothing_of_is_an_error_of_that_request_alone(llm):
    words = GREEDY.replace(allowed_token_ids=(50,), bad_words=(llm.get_tokenizer().decode([50]),))
    with pytest.raises(StepError, match="No token is left"):
        llm.generate(TEXTS[0], words, use_tqdm=False)
    assert llm.generate(TEXTS[0], GREEDY, use_tqdm=False)[0].finished


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_model_len": 100_000}, "longer than the 8192 tokens"),
        ({"num_gpu_blocks_override": 4, "max_model_len": 512}, "needs 32 KV blocks, but only 4 fit"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 64, "max_num_seqs": 8}, "max_num_batched_tokens"),
        ({"kv_cache_memory_bytes": 1000}, "set kv_cache_memory_bytes higher"),
        ({"kernels": "cuda-graphs"}, "kernels cannot be used"),
    ],
)
def test_an_impossible_configuration_is_said_in_one_sentence(smollm2, options, words):
    settings = {"load_format": "dummy", "dtype": "float32"} | options
    with pytest.raises(ConfigError, match=words):
        LLM(str(smollm2), **settings)


async def test_streams_add_up_abort_and_go_on(smollm2, llm):
    engine = AsyncLLM(EngineConfig(model=str(smollm2), **OPTIONS))
    try:

        async def whole(text: str) -> str:
            seen = ""
            async for output in engine.generate(text, GREEDY):
                assert output.outputs[0].text.startswith(seen)
                seen = output.outputs[0].text
            assert output.finished
            return seen

        async def leave_early(text: str) -> None:
            stream = engine.generate(text, GREEDY.replace(max_tokens=400, ignore_eos=True))
            async for _ in stream:
                break
            await stream.aclose()

        got = await asyncio.gather(*(whole(t) for t in TEXTS), *(leave_early(t) for t in TEXTS))
        assert list(got[: len(TEXTS)]) == [t[0] for t in texts(llm.generate(TEXTS, GREEDY, use_tqdm=False))]
        for _ in range(100):
            if engine.stats().kv_blocks_held == 0:
                break
            await asyncio.sleep(0.02)
        assert engine.stats().kv_blocks_held == 0
        with pytest.raises(RequestError, match="empty"):
            await engine.generate("", GREEDY).__anext__()
        stream = engine.generate(TEXTS[0], GREEDY.replace(max_tokens=400, ignore_eos=True), request_id="mine")
        await stream.__anext__()
        await engine.abort("mine")
        *_, last = [output async for output in stream]
        assert last.outputs[0].finish_reason == "abort"
        await engine.check_health()
    finally:
        engine.shutdown()
