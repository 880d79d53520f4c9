"""From GGUF tensor names to Hugging Face's, and what else llama.cpp's converter changed, to be undone.

One table per architecture. Knows no files, and no sizes but the number of heads.
Source: convert_hf_to_gguf.py and gguf-py's tensor_mapping.py, github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from octavo.engine.errors import ConfigError

Undo = Callable[[torch.Tensor], torch.Tensor]

# Read into the config (see gguf_config), or tables that can be recomputed: no weights of the model.
IGNORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "attn_rot_embd.weight")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a GGUF tensor belongs: Hugging Face's name, and what makes Hugging Face's tensor of it.

    undo: of an unquantized tensor; None = nothing. A quantized matrix is [outputs, inputs] in both: it is never
    transposed. heads: so many heads have their rows in another order (see `row_order`); 0 = rows are in order.
    """

    name: str
    undo: Undo | None = None
    heads: int = 0


@dataclass(frozen=True, slots=True)
class NameRules:
    """How one architecture's tensors are called: `outer` those outside of the blocks, `inner` those within block N.

    block: what Hugging Face calls `blk`. rotated: the query's and the key's name if the converter reordered their rows.
    transposed: names of matrices it transposed. norm_offset: what it added to the weights of norms.
    """

    outer: Mapping[str, str]
    inner: Mapping[str, str]
    block: str = "model.layers"
    rotated: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    norm_offset: float = 0.0

    def place(self, name: str, num_heads: int, num_kv_heads: int) -> Place | None:
        """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`. None: no such tensor is known."""
        stem, _, kind = name.rpartition(".")
        block, found = "", self.outer.get(stem)
        if stem.startswith("blk.") and stem.count(".") == 2:
            _, number, stem = stem.split(".")
            block, found = f"{self.block}.{number}.", self.inner.get(stem)
        if found is None or kind not in ("weight", "bias"):
            return None
        heads = 0
        if stem in self.rotated:
            heads = num_heads if stem == self.rotated[0] else num_kv_heads
        return Place(f"{block}{found}.{kind}", self._undo(stem, kind), heads)

    def _undo(self, stem: str, kind: str) -> Undo | None:
        if kind == "weight" and stem in self.transposed:
            return torch.t
        if kind == "weight" and self.norm_offset and stem.endswith("norm"):
            return lambda tensor: tensor.float() - self.norm_offset
        return None


def row_order(rows: int, heads: int) -> torch.Tensor:
    """[rows] int64, the stored row at each place, of heads × D rows. Rotation pairs the components 2i and 2i + 1 of a
    head in GGUF, i and i + D/2 in HF."""
    if rows % (2 * heads):
        raise ConfigError(f"A query or key of {rows} rows does not split into {heads} heads: damaged metadata.")
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_QKV = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_OUT = {"attn_output": "self_attn.o_proj"}
_LLAMA = {**_NORMS, **_QKV, **_OUT, **_MLP}
_GEMMA = {
    **_LLAMA,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

RULES: dict[str, NameRules] = {
    "llama": NameRules(_OUTER, _LLAMA, rotated=("attn_q", "attn_k")),
    "qwen2": NameRules(_OUTER, _LLAMA),
    "qwen3": NameRules(_OUTER, {**_LLAMA, **_HEAD_NORMS}),
    "gemma2": NameRules(_OUTER, _GEMMA, norm_offset=1.0),
    "gemma3": NameRules(_OUTER, {**_GEMMA, **_HEAD_NORMS}, norm_offset=1.0),
    "phi3": NameRules(
        _OUTER,
        {**_NORMS, **_OUT, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
    ),
    "gpt2": NameRules(
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        block="transformer.h",
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
}
