"""Which LinearMethod each kind of matrix gets, from what the user asked for and what the checkpoint is.

Knows the names a user may give and which of them fit which checkpoint. Does not know how a matrix is packed or loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.engine.errors import ConfigError
from octavo.engine.layers.linear_method import LinearMethod, Unquantized
from octavo.engine.layers.packed import PackedMethod
from octavo.engine.quant.on_load import quantizer
from octavo.kernels.ops import Ops

ON_LOAD = ("int8", "int4", "fp8")


@dataclass(frozen=True, slots=True)
class Methods:
    """name: of the number format; linear: of linear layers; head: of the head and a table tied to it; table: of other
    embedding tables. rounds_inputs: linear layers multiply with inputs rounded to 8 bits, which makes a last bit's
    difference in them one of a hundredth in what comes out."""

    name: str
    linear: LinearMethod
    head: LinearMethod
    table: LinearMethod
    rounds_inputs: bool = False


def choose_methods(quantization: str, quantize_lm_head: bool, stored: str | None, ops: Ops) -> Methods:
    """stored: the format a checkpoint is quantized in ("gguf", "gptq", …); None = it holds floats.

    quantization auto: as the checkpoint is. none: floats, whatever the checkpoint is. int8, int4, fp8: made while
    loading. The name of a checkpoint's own format asks for just that. Raises ConfigError if it has another one.
    """
    native = dict(ops.bodies)["linear"] != "ref"
    if quantization in ON_LOAD:
        quantized = PackedMethod(ops, quantizer(quantization), dequantize=True)
        plain = PackedMethod(ops, dequantize=True) if native else Unquantized()
        # The head's errors are the logits' errors, and it is a small part of most models.
        head = PackedMethod(ops, quantizer("int8"), dequantize=True) if quantization == "int4" else quantized
        rounds = native and quantization != "fp8"
        return Methods(quantization, quantized, head if quantize_lm_head else plain, plain, rounds)
    if quantization not in ("auto", "none", stored):
        has = f"is in {stored}" if stored else "holds floats"
        raise ConfigError(
            f"quantization is {quantization}, but the checkpoint {has}: leave it at auto to load it as it is, "
            f"or choose one of {', '.join(ON_LOAD)}, which are made while loading."
        )
    if quantization == "none" or stored is None:
        plain = PackedMethod(ops, dequantize=True) if native else Unquantized()
        return Methods("none", plain, plain, plain)
    kept = PackedMethod(ops)
    head = kept if quantize_lm_head else PackedMethod(ops, dequantize=True)
    return Methods(stored, kept, head, kept, rounds_inputs=native and stored != "fp8")
