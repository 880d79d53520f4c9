"""From checkpoint tensors to a model's parameters: one walk, and whatever is still in files read ahead of it.

Knows names and shapes. What a rank keeps of a tensor is the layer's business; where tensors come from is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing

import torch

from octavo.engine.errors import ConfigError
from octavo.engine.layers.decoder import CausalLM, WeightTarget
from octavo.engine.layers.weight import Layer, Source
from octavo.engine.loader.file_tensor import Expected, FileTensor
from octavo.engine.loader.finishing import Finishing
from octavo.engine.loader.memory import give_back_device
from octavo.engine.loader.read_ahead import read_ahead
from octavo.engine.loader.staging import staging_of

HEAD = "lm_head"
# module path → weight name → names of the parts that want a tensor, in the model's order
Wanted = Mapping[str, Mapping[str, tuple[str, ...]]]


CPU = torch.device("cpu")


def load_weights(
    model: CausalLM,
    tensors: Iterable[tuple[str, Source]],
    on_bytes: Callable[[int], None] | None = None,
    device: torch.device = CPU,
    workers: int = 1,
) -> None:
    """Fill every parameter of `model` from (name, tensor) pairs in any order.

    Tensors are cut to this rank's share, which alone is read if they are still in a file, and cast to the parameters'
    dtype. Tensors of other pipeline stages are passed over unread. A layer is finished as soon as it has all of
    its tensors, so that no more than one weight is there twice. `on_bytes` is called after each tensor with its size,
    kept or not. device: the model's, to which what is in files is read ahead. workers: threads that finish layers, each
    of which is there twice meanwhile. Raises ConfigError that names the first
    tensor that is unexpected, given twice or of a wrong shape, or the first that is missing at the end.
    """
    layers = _layers(model)
    wanted = _wanted(layers)
    elsewhere = [_wanted(_layers(whole)) for whole in model.whole]
    missing = {path: {(name, part) for name, parts in wanted[path].items() for part in parts} for path in layers}
    reading = closing(read_ahead(tensors, _Wishes(model, layers), staging_of(device)))
    with Finishing(workers) as finishing, reading as read:
        for name, tensor in read:
            target = model.weight_names.target(name)
            if target is not None and not _is_tied_head(model, target):
                parts = _claimed(wanted, target)
                if parts:
                    layer, lacks = layers[target.module], missing[target.module]
                    _take(layer, lacks, parts, name, target, tensor)
                    if not lacks:
                        finishing.finish(layer)
                elif not any(_claimed(theirs, target) for theirs in elsewhere):
                    raise ConfigError(f"The checkpoint holds {name!r}, which the model's config has no place for.")
            if on_bytes is not None:
                on_bytes(tensor.nbytes)
            del tensor  # else it is there until the next has come
    give_back_device(device)
    lacking = [(path, *slot) for path, slots in missing.items() for slot in slots]
    if lacking:
        module, weight, part = min(lacking)
        which = f"{module}.{weight}" + (f" ({part})" if part else "")
        others = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ConfigError(f"The checkpoint lacks the weights of {which}{others}: it is incomplete or of another model.")


class _Wishes:
    """What of a tensor the model's layers will read. What is wrong with a tensor is said when it is its turn."""

    def __init__(self, model: CausalLM, layers: Mapping[str, Layer]) -> None:
        self._model = model
        self._weights = {path: layer.expects() for path, layer in layers.items()}

    def __call__(self, name: str, tensor: Source) -> Sequence[Source]:
        target = self._model.weight_names.target(name)
        weight = None if target is None else self._weights.get(target.module, {}).get(target.weight)
        if target is None or weight is None or _is_tied_head(self._model, target):
            return ()
        try:
            return weight.will_read(target.part, _turned(tensor, target))
        except ConfigError:
            return ()


def _turned(tensor: Source, target: WeightTarget) -> Source:
    """[outputs, inputs]. What is not a plain tensor comes so already."""
    return tensor.t() if target.transpose and isinstance(tensor, (torch.Tensor, FileTensor, Expected)) else tensor


def _take(
    layer: Layer, lacks: set[tuple[str, str]], parts: tuple[str, ...], name: str, target: WeightTarget, tensor: Source
) -> None:
    """Give a tensor to its layer. lacks: what the layer has not got yet."""
    if not lacks.issuperset((target.weight, part) for part in parts):
        raise ConfigError(f"The checkpoint holds {name!r} twice.")
    try:
        layer.load(target.weight, target.part, _turned(tensor, target))
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"The checkpoint's {name!r} {error}.") from None
    lacks.difference_update([(target.weight, part) for part in parts])


def _layers(model: CausalLM) -> dict[str, Layer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Layer)}


def _wanted(layers: Mapping[str, Layer]) -> Wanted:
    return {
        path: {name: tuple(part.name for part in weight.rule.parts) for name, weight in layer.expects().items()}
        for path, layer in layers.items()
    }


def _claimed(wanted: Wanted, target: WeightTarget) -> tuple[str, ...]:
    """The parts a tensor would fill; empty when there is no such weight."""
    parts = wanted.get(target.module, {}).get(target.weight, ())
    return tuple(part for part in parts if target.part is None or part == target.part)


def _is_tied_head(model: CausalLM, target: WeightTarget) -> bool:
    """Some checkpoints repeat the embedding as the head; a model that only pools has none."""
    head = (model.whole or [model])[0].lm_head
    return target.module == HEAD and (head is None or bool(head.tied))
