"""Models written to GGUF as llama.cpp's converter writes them, and read back: same tensors, same config, same logits.

The names come from gguf's own table, so both directions are not ours.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map

from octavo.engine.errors import ConfigError
from octavo.engine.loader.checkpoint import GenerationDefaults, open_checkpoint
from octavo.engine.loader.gguf import GGUFCheckpoint
from octavo.engine.loader.source import ModelSource
from octavo.kernels.matrix import Matrix

sys.path.insert(0, str(Path(__file__).parent))
from gguf_writer import as_converter_stores, write_gguf, write_metadata

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + i / 8 for i in range(6)],
    "long_factor": [1.5 + i for i in range(6)],
    "partial_rotary_factor": 0.75,
}


@dataclass(frozen=True)
class Case:
    arch: MODEL_ARCH
    config: str
    fields: dict[str, Any]


CASES = {
    "llama-tied": Case(MODEL_ARCH.LLAMA, "LlamaConfig", {"tie_word_embeddings": True}),
    "llama3-rope": Case(
        MODEL_ARCH.LLAMA,
        "LlamaConfig",
        {"rope_parameters": LLAMA3, "head_dim": 32, "max_position_embeddings": 16384},
    ),
    "llama-bias": Case(MODEL_ARCH.LLAMA, "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Case(MODEL_ARCH.LLAMA, "MistralConfig", {"sliding_window": 8, "head_dim": 8}),
    "qwen2-yarn": Case(MODEL_ARCH.QWEN2, "Qwen2Config", {"rope_parameters": YARN}),
    "qwen3": Case(MODEL_ARCH.QWEN3, "Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": Case(
        MODEL_ARCH.GEMMA2,
        "Gemma2Config",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "final_logit_softcapping": 20.0},
    ),
    "gemma3": Case(
        MODEL_ARCH.GEMMA3,
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "phi3": Case(MODEL_ARCH.PHI3, "Phi3Config", {"sliding_window": 8}),
    "phi3-longrope": Case(
        MODEL_ARCH.PHI3,
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "tie_word_embeddings": True},
    ),
    "gpt2": Case(MODEL_ARCH.GPT2, "GPT2Config", {}),
}


def make_model(case: Case) -> torch.nn.Module:
    """A random model in which no weight is zero or one by convention."""
    config = getattr(transformers, case.config)(**{**COMMON, **case.fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = make_model(case)
    path = tmp_path / "model.gguf"
    write_gguf(path, case.arch, model)

    checkpoint = open_checkpoint(ModelSource("gguf", path, "model", "model"))
    found = dict(checkpoint.tensors())
    expected = {key: value for key, value in model.state_dict().items() if not key.endswith(".attn.bias")}
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    assert checkpoint.num_tensors == len(found)
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in found.values())
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        exact = 0.0 if "norm" not in key else 1e-6  # Gemma's norms went through + 1 - 1
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=exact)

    assert checkpoint.config.architectures == [type(model).__name__]
    assert checkpoint.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert checkpoint.eos_token_ids == (2,)
    again = transformers.AutoModelForCausalLM.from_config(checkpoint.config, attn_implementation="eager").float().eval()
    again.load_state_dict(found, strict=False)
    again.tie_weights()
    ids = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_quantized_llama(kind: str, tmp_path: Path) -> None:
    case = Case(MODEL_ARCH.LLAMA, "LlamaConfig", {})
    model = make_model(case)
    path = tmp_path / "model.gguf"
    write_gguf(path, case.arch, model, GGMLQuantizationType[kind])
    allowed = {"Q8_0": 0.01, "Q4_0": 0.2, "F16": 1e-3, "BF16": 1e-2}[kind]
    for name, tensor in GGUFCheckpoint(path).tensors():
        tensor = tensor.dequantize() if isinstance(tensor, Matrix) else tensor.float()
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=allowed)


@pytest.mark.parametrize("name", ["llama-bias", "phi3", "gpt2", "gemma2"])
def test_quantized_matrices_are_the_layers(name: str, tmp_path: Path) -> None:
    """Matrices are [outputs, inputs] with queries and keys in Hugging Face's order, also where HF keeps transposes."""
    case = CASES[name]
    model = make_model(case)
    path = tmp_path / "model.gguf"
    write_gguf(path, case.arch, model, GGMLQuantizationType.Q8_0)
    checkpoint = GGUFCheckpoint(path)
    floats, state = dict(checkpoint.float_tensors()), model.state_dict()
    for key, weight in checkpoint.tensors():
        assert isinstance(weight, Matrix) == (state[key].dim() == 2)
        torch.testing.assert_close(floats[key], state[key], rtol=0, atol=0.01)
        if isinstance(weight, Matrix):
            transposed = name == "gpt2" and ".h." in key
            assert torch.equal(weight.dequantize(), floats[key].t() if transposed else floats[key])
        else:
            assert torch.equal(weight, floats[key])


def test_tensors_can_be_read_twice(llama: Path) -> None:
    checkpoint = GGUFCheckpoint(llama)
    assert [name for name, _ in checkpoint.tensors()] == [name for name, _ in checkpoint.tensors()]


def test_rope_divisors_of_no_known_rule_are_kept(tmp_path: Path) -> None:
    divisors = np.array([1.0, 1.3, 2.0, 5.0, 7.0, 7.5, 8.0, 9.0], dtype=np.float32)
    path = _write_llama(tmp_path, extra={"rope_freqs.weight": divisors})
    rope = GGUFCheckpoint(path).config.rope_parameters
    assert rope["rope_type"] == "longrope"
    assert rope["attention_factor"] == 1.0
    assert rope["short_factor"] == rope["long_factor"] == divisors.tolist()


def test_llama3_rule_is_recognised(tmp_path: Path) -> None:
    model = make_model(CASES["llama3-rope"])
    write_gguf(tmp_path / "model.gguf", MODEL_ARCH.LLAMA, model)
    rope = GGUFCheckpoint(tmp_path / "model.gguf").config.rope_parameters
    assert {key: rope[key] for key in LLAMA3} == LLAMA3


def test_end_of_turn_tokens_end_a_sequence(tmp_path: Path) -> None:
    tokens = ["a"] * 90 + ["<|im_end|>", "<end_of_turn>", "b", "c", "d", "e"]
    path = _write_llama(tmp_path, eot=95, tokens=tokens, control=[91])
    assert GGUFCheckpoint(path).eos_token_ids == (2, 95, 91)  # 90 is text that looks like a control token


def test_generation_defaults(tmp_path: Path, llama: Path) -> None:
    assert GGUFCheckpoint(llama).generation_defaults is None
    path = _write_llama(tmp_path, temperature=0.6, name="b.gguf")
    defaults = GGUFCheckpoint(path).generation_defaults
    assert defaults is not None
    assert defaults.temperature == pytest.approx(0.6)
    assert defaults == GenerationDefaults(temperature=defaults.temperature)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return _write_llama(tmp_path)


def _write_llama(
    folder: Path,
    *,
    name: str = "model.gguf",
    arch: str = "llama",
    extra: dict[str, np.ndarray] | None = None,
    kind: int | None = None,
    eot: int | None = None,
    tokens: list[str] | None = None,
    control: list[int] | None = None,
    temperature: float | None = None,
    experts: int = 0,
    heads: list[int] | int = 4,
) -> Path:
    """A file with a llama's metadata and its embedding only."""
    path = folder / name
    writer = GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_eos_token_id(2)
    if eot is not None:
        writer.add_eot_token_id(eot)
    if tokens is not None:
        writer.add_token_list(tokens)
        writer.add_token_types([3 if i in (control or []) else 1 for i in range(len(tokens))])
    if temperature is not None:
        writer.add_float32("general.sampling.temp", temperature)
    if experts:
        writer.add_expert_count(experts)
    writer.add_tensor("token_embd.weight", np.zeros((96, 64), dtype=np.float32))
    for key, value in (extra or {}).items():
        writer.add_tensor(key, value)
    if kind is not None:
        writer.add_tensor(
            "output.weight",
            np.zeros((96, 64), dtype=np.uint8),
            raw_shape=(96, 64),
            raw_dtype=GGMLQuantizationType(kind),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_unsupported_quantization_names_type_tensor_and_choice(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((4, 136), dtype=np.uint8), raw_dtype=GGMLQuantizationType.IQ4_XS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"token_embd\.weight.*IQ4_XS.*supported are F32.*Q4_K"):
        GGUFCheckpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("size", [0, 3, 20, 200, 5000])
def test_cut_off_file(size: int, llama: Path) -> None:
    llama.write_bytes(llama.read_bytes()[:size])
    with pytest.raises(ConfigError, match=r"model\.gguf"):
        GGUFCheckpoint(llama)


def test_not_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 4)
    with pytest.raises(ConfigError, match="not a GGUF file"):
        GGUFCheckpoint(path)


@pytest.mark.parametrize("seed", range(30))
def test_damaged_header_is_an_error_or_harmless(seed: int, llama: Path) -> None:
    random = np.random.default_rng(seed)
    data = bytearray(llama.read_bytes())
    for at in random.integers(4, 500, 4):
        data[at] = random.integers(256)
    llama.write_bytes(data)
    try:
        for _ in GGUFCheckpoint(llama).tensors():
            pass
    except ConfigError:
        pass


def test_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'mamba' is not supported; supported are llama"):
        GGUFCheckpoint(_write_llama(tmp_path, arch="mamba"))


def test_unknown_tensor(tmp_path: Path) -> None:
    path = _write_llama(tmp_path, extra={"blk.0.ffn_oddity.weight": np.zeros(64, dtype=np.float32)})
    with pytest.raises(ConfigError, match=r"blk\.0\.ffn_oddity\.weight"):
        GGUFCheckpoint(path)


def test_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expert_count"):
        GGUFCheckpoint(_write_llama(tmp_path, experts=8))


def test_heads_that_differ_between_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="head_count differs"):
        GGUFCheckpoint(_write_llama(tmp_path, heads=[4, 8]))
    assert GGUFCheckpoint(_write_llama(tmp_path, heads=[4, 4], name="b.gguf")).config.num_attention_heads == 4


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((96, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"lacks the metadata 'llama\."):
        GGUFCheckpoint(tmp_path / "model.gguf")


def test_split_file(tmp_path: Path) -> None:
    model = make_model(CASES["llama-tied"])
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, MODEL_ARCH.LLAMA, model)
    expected = dict(GGUFCheckpoint(whole).tensors())

    first, second = (tmp_path / f"model-0000{i}-of-00002.gguf" for i in (1, 2))
    _split(model, first, second)
    found = dict(GGUFCheckpoint(first).tensors())
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ConfigError, match="give the first part"):
        GGUFCheckpoint(second)
    second.unlink()
    with pytest.raises(ConfigError, match=f"{second.name} is not beside it"):
        GGUFCheckpoint(first)


def _split(model: Any, first: Path, second: Path) -> None:
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    writers = [GGUFWriter(path, "llama") for path in (first, second)]
    write_metadata(writers[0], MODEL_ARCH.LLAMA, model.config)
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        if name != "lm_head.weight":
            data = as_converter_stores(MODEL_ARCH.LLAMA, name, tensor, model.config).contiguous().numpy()
            writers[i % 2].add_tensor(names.get_name(name, try_suffixes=(".weight",)), data)
    for writer in writers:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
