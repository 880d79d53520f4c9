"""From the tensors of a quantized checkpoint to one weight per module.

Knows which tensors make up a module in each format. What they hold is in the formats' own files; what becomes of a
Matrix is the caller's business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

import torch

from octavo.engine.errors import ConfigError
from octavo.engine.quant import awq, compressed_tensors, fp8, gptq
from octavo.engine.quant.scheme import AWQ, GPTQ, Floats, Ints, Packed, Scheme, WeightFormat
from octavo.engine.quant.stored import Piece, Pieces, StoredModule
from octavo.kernels.matrix import Matrix

log = logging.getLogger(__name__)

# Last names of tensors that are pieces of a quantized module; `weight` is one only if its dtype is a quantized one.
_PIECES = (
    *("weight", "qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_shape", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx"),
)
_SAME = {"weight_scale_inv": "weight_scale"}
_QUANTIZED = (torch.int8, torch.float8_e4m3fn)
# Scales measured for activations and for KV in 8 bits. Activations get theirs token by token; KV is not quantized.
_UNUSED = (
    *("input_scale", "input_zero_point", "activation_scale", "output_scale", "output_zero_point"),
    *("q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point"),
)


def matrices(
    tensors: Iterable[tuple[str, torch.Tensor]], scheme: Scheme
) -> Iterator[tuple[str, torch.Tensor | Matrix]]:
    """As `stored_matrices`, read."""
    for name, weight in stored_matrices(tensors, scheme):
        try:
            yield name, weight if isinstance(weight, torch.Tensor) else weight.read()
        except ValueError as error:
            raise ConfigError(f"The checkpoint's quantized {name.removesuffix('.weight')} {error}.") from None


def stored_matrices(tensors: Iterable[tuple[str, Piece]], scheme: Scheme) -> Iterator[tuple[str, Piece | StoredModule]]:
    """Each quantized module's `<module>.weight` as soon as all its pieces have come, in any order; others unchanged.

    Nothing of a module is read but its shape, so pieces that are views of files cost nothing until they are.
    Raises ConfigError naming a module whose pieces do not fit together, are incomplete, or that should not have any.
    """
    waiting: dict[str, dict[str, Piece]] = {}
    told = False
    for name, tensor in tensors:
        module, _, last = name.rpartition(".")
        if last in _UNUSED:
            if not told:
                log.info("%r and its like are not used: activations get their scales token by token.", name)
            told = True
        elif last not in _PIECES or (last == "weight" and tensor.dtype not in _QUANTIZED):
            yield name, tensor
        else:
            form = _form(scheme, module, name)
            piece = _SAME.get(last, last)
            if piece in _needed(form):
                pieces = waiting.setdefault(module, {})
                pieces[piece] = tensor
                if len(pieces) == len(_needed(form)):
                    yield f"{module}.weight", stored_module(form, module, waiting.pop(module))
            elif not _says_nothing(form, piece, tensor):
                raise ConfigError(
                    f"The checkpoint holds {name!r} ({str(tensor.dtype).removeprefix('torch.')}), which does not go "
                    f"with its {scheme.method} config."
                )
    for module, pieces in waiting.items():
        lacking = [piece for piece in _needed(_form(scheme, module, module)) if piece not in pieces]
        raise ConfigError(
            f"The checkpoint lacks {module}.{lacking[0]}, but holds {module}.{min(pieces)}: it is incomplete, or "
            f"its {scheme.method} config is not its own."
        )


def _form(scheme: Scheme, module: str, name: str) -> WeightFormat:
    form = scheme.format_of(module)
    if form is None:
        raise ConfigError(f"The checkpoint holds {name!r}, but its {scheme.method} config leaves {module} unquantized.")
    return form


def _needed(form: WeightFormat) -> tuple[str, ...]:
    """The pieces that make a Matrix."""
    match form:
        case GPTQ():
            return ("qweight", "qzeros", "scales", *(("g_idx",) if form.reordered else ()))
        case AWQ():
            return ("qweight", "scales", *(("qzeros",) if form.zero_point else ()))
        case Packed():
            zeros = ("weight_zero_point",) if form.zero_point else ()
            order = ("weight_g_idx",) if form.reordered else ()
            return ("weight_packed", "weight_shape", "weight_scale", *zeros, *order)
        case Ints():
            return ("weight", "weight_scale", *(("weight_zero_point",) if form.zero_point else ()))
        case Floats():
            return ("weight", "weight_scale")


def _says_nothing(form: WeightFormat, piece: str, tensor: torch.Tensor) -> bool:
    """Whether a piece that is not needed states only what the config has said: no order, no zero points."""
    match form, piece:
        case GPTQ() | Packed(), "g_idx" | "weight_g_idx":
            width = len(tensor)
            return torch.equal(tensor.long(), torch.arange(width) // (form.group_size or width))
        case _, "qzeros" | "weight_zero_point":  # where the config has none, they are all the middle one
            return not isinstance(form, GPTQ)
        case _:
            return False


def stored_module(form: WeightFormat, module: str, pieces: Pieces) -> StoredModule:
    """Of all the tensors that make up a module in that format. Raises ConfigError naming it if they do not."""
    try:
        return StoredModule.of(form, pieces, lambda cut: _matrix(form, cut))
    except ValueError as error:
        raise ConfigError(f"The checkpoint's quantized {module} has tensors of other shapes: {error}.") from None


def _matrix(form: WeightFormat, pieces: Mapping[str, torch.Tensor]) -> Matrix:
    match form:
        case GPTQ():
            return gptq.matrix(form, pieces)
        case AWQ():
            return awq.matrix(form, pieces)
        case Packed():
            return compressed_tensors.packed(form, pieces)
        case Ints():
            return compressed_tensors.ints(form, pieces)
        case Floats():
            return fp8.matrix(form, pieces)
