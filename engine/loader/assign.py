"""From checkpoint tensors to a model's parameters: one walk, one tensor in memory at a time.

Knows names and shapes. What a rank keeps of a tensor is the layer's business; where tensors come from is the caller's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable

import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.decoder import CausalLM, WeightTarget
from octavo.engine.layers.norm import LayerNorm, RMSNorm
from octavo.engine.layers.weight import Layer
from octavo.kernels.matrix import Matrix

HEAD = "lm_head"
Slot = tuple[str, str, str]  # module path, weight name, part name


def load_weights(
    model: CausalLM, tensors: Iterable[tuple[str, torch.Tensor]], on_bytes: Callable[[int], None] | None = None
) -> None:
    """Fill every parameter of `model` from (name, tensor) pairs in any order.

    Tensors are cast to the parameters' dtype and cut to this rank's share. `on_bytes` is called after each tensor with
    its size, kept or not. Raises ConfigError that names the first tensor that is unexpected, given twice or of a wrong
    shape, or the first that is missing at the end.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Layer)}
    missing = set(_slots(layers))
    known = set(missing)
    for name, tensor in tensors:
        target = model.weight_names.target(name)
        if isinstance(tensor, Matrix):
            tensor = tensor.dequantize().t() if target is not None and target.transpose else tensor.dequantize()
        if target is not None and not _is_tied_head(model, target):
            slots = _claimed(layers, target)
            if not slots or not known.issuperset(slots):
                raise ConfigError(f"The checkpoint holds {name!r}, which the model's config has no place for.")
            if not missing.issuperset(slots):
                raise ConfigError(f"The checkpoint holds {name!r} twice.")
            try:
                layers[target.module].load(target.weight, target.part, tensor.t() if target.transpose else tensor)
            except ConfigError as error:
                raise ConfigError(f"The checkpoint's {name!r} {error}.") from None
            missing.difference_update(slots)
        if on_bytes is not None:
            on_bytes(tensor.nbytes)
    if missing:
        module, weight, part = min(missing)
        which = f"{module}.{weight}" + (f" ({part})" if part else "")
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"The checkpoint lacks the weights of {which}{others}: it is incomplete or of another model.")
    _finish(layers)


def init_dummy(model: CausalLM, seed: int) -> None:
    """Random weights for measuring without a checkpoint: the same model whatever the mesh, for one seed and device.

    Whole tensors are drawn and cut as a checkpoint's are. Norms become the identity, biases zero.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Layer)}
    for module, weight, part in _slots(layers):
        layer = layers[module]
        parameter = layer.expects()[weight]
        if weight == "bias":
            continue
        if isinstance(layer, (RMSNorm, LayerNorm)):
            parameter.data.fill_(1)
            continue
        generator = torch.Generator(parameter.device)
        generator.manual_seed(zlib.crc32(f"{seed} {module} {weight} {part}".encode()))
        dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
        tensor = torch.empty(parameter.source_shape(part), dtype=dtype, device=parameter.device)
        layer.load(weight, part, tensor.normal_(0, 0.02, generator=generator))
    _finish(layers)


def _finish(layers: dict[str, Layer]) -> None:
    """One layer after the other, so that no more than one weight is there twice."""
    for layer in layers.values():
        layer.finish()


def _slots(layers: dict[str, Layer]) -> list[Slot]:
    """Every (module, weight, part) that wants a tensor, in the model's order."""
    return [
        (path, name, part.name)
        for path, layer in layers.items()
        for name, weight in layer.expects().items()
        for part in weight.rule.parts
    ]


def _claimed(layers: dict[str, Layer], target: WeightTarget) -> list[Slot]:
    """The slots a tensor would fill; empty when there is no such weight."""
    if target.module not in layers:
        return []
    weight = layers[target.module].expects().get(target.weight)
    if weight is None:
        return []
    return [(target.module, target.weight, part.name) for part in weight.parts(target.part)]


def _is_tied_head(model: CausalLM, target: WeightTarget) -> bool:
    """Some checkpoints repeat the embedding as the head."""
    return target.module == HEAD and bool(model.lm_head.tied)
