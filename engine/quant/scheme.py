"""What a Hugging Face config says about how its checkpoint is quantized.

Knows the configs' words alone: no tensors, no torch. A config that asks for something we do not read is refused here,
before any weight is touched.
Sources: `quantization_config` as written by AutoGPTQ and GPTQModel, AutoAWQ, compressed-tensors (`config_groups`), and
transformers' and vLLM's fp8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GPTQ:
    """bits: 4 or 8. group_size: inputs that share a scale, 0 = all. reordered: `g_idx` says each input's group.

    one_less: the stored zero points are one too small (the first checkpoint format; gptq_v2 stores them as they are).
    """

    bits: int
    group_size: int
    reordered: bool
    one_less: bool


@dataclass(frozen=True, slots=True)
class AWQ:
    """4 bits. group_size: see GPTQ. zero_point: every group has one; else it is 8."""

    group_size: int
    zero_point: bool


@dataclass(frozen=True, slots=True)
class Packed:
    """compressed-tensors' pack-quantized integers. bits: 4 or 8. group_size, reordered: see GPTQ."""

    bits: int
    group_size: int
    zero_point: bool
    reordered: bool


@dataclass(frozen=True, slots=True)
class Ints:
    """Integers of 4 or 8 bits in int8 tensors. group_size: see GPTQ. zero_point: there are some, else they are 0."""

    bits: int
    group_size: int
    zero_point: bool


@dataclass(frozen=True, slots=True)
class Floats:
    """float8_e4m3fn. block: (outputs, inputs) that share a scale, 0 = all; None = one scale per output, or one."""

    block: tuple[int, int] | None


WeightFormat = GPTQ | AWQ | Packed | Ints | Floats


@dataclass(frozen=True, slots=True)
class Rule:
    """targets: module names, `re:` patterns that a name starts with, or "Linear", which is every module."""

    targets: tuple[str, ...]
    format: WeightFormat


@dataclass(frozen=True, slots=True)
class Scheme:
    """A quantized checkpoint: which modules are stored how. Modules are called as in the checkpoint.

    method: as `quant_method` calls it. rules: a rule that names a module goes before one for all of them.
    ignored: modules left unquantized: names or parts of names, or `re:` patterns.
    """

    method: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    @property
    def has_float8(self) -> bool:
        """Whether any of the modules is stored so."""
        return any(isinstance(rule.format, Floats) for rule in self.rules)

    def format_of(self, module: str) -> WeightFormat | None:
        """None: the module is not quantized."""
        if any(_names(pattern, module) for pattern in self.ignored):
            return None
        for rule in self.rules:
            if any(_names(target, module) for target in rule.targets):
                return rule.format
        return next((rule.format for rule in self.rules if _EVERY in rule.targets), None)


_EVERY = "Linear"


def read_scheme(hf_config: Any) -> Scheme | None:
    """From a transformers config. None: the checkpoint is not quantized. Raises ConfigError for what we do not read."""
    found = getattr(hf_config, "quantization_config", None)
    if not found:
        return None
    config: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    method = str(config.get("quant_method") or "").replace("_", "-")
    if method not in _READERS:
        raise ConfigError(
            f"The checkpoint is quantized with {method or 'no quant_method named'}, which is not supported; "
            f"supported are {', '.join(_READERS)} and GGUF files."
        )
    return _READERS[method](config)


def _names(pattern: str, module: str) -> bool:
    """Whether a name, a run of its segments or a pattern means the module: `lm_head`, `layers.0`, `re:.*mlp.*`."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return f".{pattern}." in f".{module}."


def _ignored(config: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    return tuple(name for key in keys for name in config.get(key) or ())


def _only(method: str, option: str, value: Any, supported: tuple[Any, ...]) -> None:
    if value not in supported:
        words = " or ".join(str(one) for one in supported)
        raise ConfigError(f"The checkpoint's {method} quantization has {option} {value!r}; supported is {words}.")


def _group_size(method: str, value: Any) -> int:
    """-1 → 0."""
    if value == -1:
        return 0
    if not isinstance(value, int) or value <= 0 or value % 32:
        raise ConfigError(
            f"The checkpoint's {method} quantization has group_size {value!r}; supported are multiples of 32, and -1."
        )
    return value


def _gptq(config: Mapping[str, Any]) -> Scheme:
    bits = config.get("bits")
    _only("gptq", "bits", bits, (4, 8))
    layout = config.get("checkpoint_format") or "gptq"
    _only("gptq", "checkpoint_format", layout, ("gptq", "gptq_v2"))
    _only("gptq", "is_marlin_format", bool(config.get("is_marlin_format")), (False,))
    _only("gptq", "pack_dtype", config.get("pack_dtype") or "int32", ("int32",))
    exceptions = config.get("dynamic") or {}  # "-:pattern" excludes modules, "+:pattern" gives them other options
    changed = [pattern for pattern in exceptions if not pattern.startswith("-:")]
    if changed:
        raise ConfigError(
            f"The checkpoint's gptq quantization has other options for the modules {changed[0]!r} (dynamic); "
            "supported is one set of options for all."
        )
    format = GPTQ(
        bits=int(bits or 0),
        group_size=_group_size("gptq", config.get("group_size")),
        reordered=bool(config.get("desc_act")),
        one_less=layout == "gptq",
    )
    ignored = (*_ignored(config, "modules_to_not_convert"), *(f"re:{pattern[2:]}" for pattern in exceptions))
    return Scheme("gptq", (Rule((_EVERY,), format),), ignored)


def _awq(config: Mapping[str, Any]) -> Scheme:
    _only("awq", "bits", config.get("bits", config.get("w_bit")), (4,))
    _only("awq", "version", str(config.get("version") or "gemm").lower(), ("gemm",))
    group_size = _group_size("awq", config.get("group_size", config.get("q_group_size")))
    format = AWQ(group_size, bool(config.get("zero_point", True)))
    return Scheme("awq", (Rule((_EVERY,), format),), _ignored(config, "modules_to_not_convert"))


def _fp8(config: Mapping[str, Any]) -> Scheme:
    _only("fp8", "fmt", config.get("fmt") or "e4m3", ("e4m3", "float8_e4m3fn"))
    _only("fp8", "activation_scheme", config.get("activation_scheme") or "dynamic", ("dynamic", "static"))
    block = config.get("weight_block_size")
    format = Floats(None if block is None else _block("fp8", "weight_block_size", block))
    return Scheme("fp8", (Rule((_EVERY,), format),), _ignored(config, "ignored_layers", "modules_to_not_convert"))


def _block(method: str, option: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or any(size <= 0 or size % 32 for size in value):
        raise ConfigError(
            f"The checkpoint's {method} quantization has {option} {value!r}; supported are two multiples of 32."
        )
    return value[0], value[1]


def _compressed_tensors(config: Mapping[str, Any]) -> Scheme:
    sparsity = (config.get("sparsity_config") or {}).get("format") or "dense"
    _only(_COMPRESSED, "a sparsity_config of format", sparsity, ("dense",))
    _only(_COMPRESSED, "a transform_config", config.get("transform_config") or None, (None,))
    groups = config.get("config_groups") or {}
    if not groups:
        raise ConfigError(f"The checkpoint's {_COMPRESSED} quantization names no config_groups: it says nothing.")
    rules = []
    for name, group in groups.items():
        layout = group.get("format") or config.get("format")
        rules.append(Rule(tuple(group.get("targets") or ()), _compressed_group(name, group, layout)))
    return Scheme(_COMPRESSED, tuple(rules), _ignored(config, "ignore"))


_COMPRESSED = "compressed-tensors"
_INT_FORMATS = ("int-quantized", "naive-quantized")
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")


def _compressed_group(name: str, group: Mapping[str, Any], layout: Any) -> WeightFormat:
    where = f"{_COMPRESSED} ({name})"
    _only(where, "format", layout, ("pack-quantized", *_INT_FORMATS, "float-quantized"))
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not weights:
        raise ConfigError(f"The checkpoint's {where} quantization has no weights in it; supported are such with.")
    if inputs:
        _only(where, "input_activations of num_bits", inputs.get("num_bits"), (8,))
    bits, kind = weights.get("num_bits"), weights.get("type") or "int"
    if kind == "float":
        _only(where, "float weights in format", layout, _FLOAT_FORMATS)
        _only(where, "float weights of num_bits", bits, (8,))
        return Floats(_float_block(where, weights))
    _only(where, "weights of type", kind, ("int",))
    _only(where, "int weights in format", layout, ("pack-quantized", *_INT_FORMATS))
    _only(where, "int weights of num_bits", bits, (4, 8))
    strategy = _strategy(weights)
    _only(where, "weights of strategy", strategy, ("tensor", "channel", "group"))
    group_size = _group_size(where, weights.get("group_size")) if strategy == "group" else 0
    order = weights.get("actorder") or None
    _only(where, "actorder", order, (None, True, "group", "dynamic", "weight", "static"))
    reordered = order in (True, "group", "dynamic")  # the others leave the groups where they are
    zero_point = not weights.get("symmetric", True)
    if layout == "pack-quantized":
        if strategy == "tensor":  # its zero point is not packed
            _only(where, "weights of strategy tensor with symmetric", not zero_point, (True,))
        return Packed(bits, group_size, zero_point, reordered)
    _only(where, "actorder in this format", reordered, (False,))
    return Ints(bits, group_size, zero_point)


def _strategy(weights: Mapping[str, Any]) -> Any:
    """What compressed-tensors takes where none is named."""
    if weights.get("strategy"):
        return weights["strategy"]
    size = weights.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _float_block(where: str, weights: Mapping[str, Any]) -> tuple[int, int] | None:
    _only(where, "float weights with symmetric", bool(weights.get("symmetric", True)), (True,))
    strategy = _strategy(weights)
    _only(where, "weights of strategy", strategy, ("tensor", "channel", "group", "block"))
    if strategy == "block":
        return _block(where, "block_structure", weights.get("block_structure"))
    return (1, _group_size(where, weights.get("group_size"))) if strategy == "group" else None


_READERS = {"gptq": _gptq, "awq": _awq, _COMPRESSED: _compressed_tensors, "fp8": _fp8}
