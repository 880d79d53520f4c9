"""Random weights for measuring without a checkpoint, in the number format that the model's config says.

Knows the model's layers and which modules of a checkpoint they are made of; how a format's tensors look is in
`octavo.engine.quant.drawn`.
"""

from __future__ import annotations

import itertools

import torch

from octavo.engine.layers.decoder import CausalLM, WeightNames
from octavo.engine.layers.linear import Linear
from octavo.engine.layers.norm import LayerNorm, RMSNorm
from octavo.engine.layers.weight import Layer, Source, Weight
from octavo.engine.loader.memory import give_back, give_back_device
from octavo.engine.quant.drawn import Dice, draw
from octavo.engine.quant.gather import stored_module
from octavo.engine.quant.scheme import Scheme, WeightFormat

CPU = torch.device("cpu")


def init_dummy(model: CausalLM, seed: int, device: torch.device = CPU, scheme: Scheme | None = None) -> None:
    """Fill every parameter: the same model whatever the mesh, for one seed and kind of device.

    device: the model's, where whole tensors are drawn, to be cut as a checkpoint's are. scheme: of the checkpoint that
    might be loaded instead; the layers' matrices that it quantizes are drawn in that format. Norms become the identity,
    biases zero.
    """
    for path, module in model.named_modules():
        if not isinstance(module, Layer):
            continue
        expected = module.expects()
        for name, weight in expected.items():
            if name == "bias":
                continue
            if isinstance(module, (RMSNorm, LayerNorm)):
                weight.data.fill_(1)
                continue
            key = f"{seed} {path} {name}"
            for part in weight.rule.parts:
                form = _format(model.weight_names, scheme, module, path, part.name)
                module.load(name, part.name, _drawn(weight, part.name, key, form, device))
        if expected:
            module.finish()
            give_back()
    give_back_device(device)


def _drawn(weight: Weight, part: str, key: str, form: WeightFormat | None, device: torch.device) -> Source:
    """The whole tensor, or module of tensors, of a part."""
    dice = Dice(f"{key} {part}", device)
    if form is not None:
        outputs, inputs = weight.source_shape(part)
        return stored_module(form, key, draw(form, outputs, inputs, dice, Dice(key, device)))
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    return dice.numbers("weight", weight.source_shape(part), dtype)


def _format(names: WeightNames, scheme: Scheme | None, layer: Layer, path: str, part: str) -> WeightFormat | None:
    """Of a part of a linear layer; heads and tables are floats in what quantizers write."""
    if scheme is None or not isinstance(layer, Linear):
        return None
    return scheme.format_of(_stored_name(names, path, part))


def _stored_name(names: WeightNames, path: str, part: str) -> str:
    """What a checkpoint calls the module of a layer's part: the name that becomes it, segment by segment; else ours."""
    prefix = names.prefixes[0] if names.prefixes else ""
    for name in itertools.product(*(_stored_segments(names, segment, part) for segment in path.split("."))):
        module = prefix + ".".join(name)
        target = names.target(f"{module}.weight")
        if target is not None and target.module == path and target.part in (part, None):
            return module
    return prefix + path


def _stored_segments(names: WeightNames, ours: str, part: str) -> list[str]:
    """The segments of checkpoints' names that may stand for one of ours, that of the very part first."""
    return [*(theirs for theirs, mine in names.modules.items() if mine in (ours, (ours, part))), ours]
