"""DeploymentConfig: everything one deployment is made of, as one frozen value read from YAML. No Ray here, no torch.

`octavo serve MODEL` is this file with defaults; a Serve config's `args` are its mapping.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from octavo.cluster.ingress.settings import MIB
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError

T = TypeVar("T")

# What a server sets otherwise than a bare engine: nothing may queue without bound.
SERVING_DEFAULTS: Mapping[str, Any] = {"max_num_queued_reqs": 1024}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def _above_zero(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ConfigError(f"{name} must be above 0, got {value}.")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one ingress accepts. None = no limit but the engine's own.

    max_body_bytes: longest request body. max_prompt_tokens: longest prompt. max_choices: prompts × n of one request.
    max_ongoing_requests: requests in progress at one ingress. request_timeout_s: age at which a request is ended.
    """

    max_body_bytes: int = 32 * MIB
    max_prompt_tokens: int | None = None
    max_choices: int = 2048
    max_ongoing_requests: int | None = None
    request_timeout_s: float | None = None

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _above_zero(f"limits.{item.name}", getattr(self, item.name))


@dataclass(frozen=True, slots=True)
class DeploymentConfig:
    """One model, its replicas and its front.

    engine: one replica. served_model_name: names that requests may use; empty = the model's own. api_key: keys of which
        clients must send one; empty = open to all.
    pattern: the topology; `replicated` = equal replicas, each of which computes whole requests.
    num_cpus: CPUs that Ray reserves for a replica; on a cluster started elsewhere also the threads it computes with.
    drain_timeout_s: how long a replica that is to stop may go on with the requests it has.
    step_timeout_s: a replica that finishes no step for so long, though there is work, is replaced. Must be above the
        longest step there can be.
    chat_template: Jinja source in place of the model's own, or a file with it.
    """

    engine: EngineConfig = field(default_factory=lambda: EngineConfig(**SERVING_DEFAULTS))
    served_model_name: tuple[str, ...] = ()
    api_key: tuple[str, ...] = ()
    limits: Limits = Limits()
    pattern: Literal["replicated"] = "replicated"
    num_replicas: int = 1
    num_cpus: float = 1.0
    drain_timeout_s: float = 60.0
    step_timeout_s: float = 300.0
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    allowed_origins: tuple[str, ...] = ("*",)
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        _above_zero("num_replicas", self.num_replicas)
        _above_zero("step_timeout_s", self.step_timeout_s)
        if self.num_cpus < 0 or self.drain_timeout_s < 0:
            raise ConfigError("num_cpus and drain_timeout_s must not be negative.")
        if not all(self.api_key):
            raise ConfigError("An API key must not be empty.")
        if not all(self.served_model_name):
            raise ConfigError("A served model name must not be empty.")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DeploymentConfig:
        """From YAML's mapping: `model` at the top, the sections `engine` and `limits`, the rest by field name.

        Raises ConfigError, naming the key, for what is unknown or of the wrong type.
        """
        values = dict(_section(values, ""))
        engine = dict(_section(values.pop("engine", None) or {}, "engine"))
        limits = _section(values.pop("limits", None) or {}, "limits")
        if "model" in engine:
            raise ConfigError("engine.model belongs at the top: write model instead.")
        if "model" in values:
            engine["model"] = values.pop("model")
        parts: dict[str, Any] = {
            "engine": EngineConfig(**{**SERVING_DEFAULTS, **_typed(EngineConfig, engine, "engine.")}),
            "limits": Limits(**_typed(Limits, limits, "limits.")),
        }
        return cls(**parts, **_typed(cls, values, "", without=("engine", "limits")))

    @classmethod
    def from_file(cls, path: Path) -> DeploymentConfig:
        """Raises ConfigError if the file cannot be read, is no YAML mapping, or holds what cannot be."""
        return cls.from_mapping(read_yaml(path))


def read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path} is not valid YAML{where}.") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must hold a mapping of settings.")
    return values


def parse_bytes(text: str) -> int:
    """`512MiB`, `4GiB`, `1.5G`, `1073741824`: K, M, G, T are powers of 1000, Ki … of 1024. Raises ConfigError."""
    letters = text.strip().lstrip("0123456789.")
    number = text.strip().removesuffix(letters)
    unit = letters.strip().upper().removesuffix("B")
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise ConfigError(f"{text!r} is not a size: write 512MiB, 4GiB or a number of bytes.") from None


def _section(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name or 'The configuration'} must be a mapping of settings.")
    return value


def _typed(cls: type[Any], values: Mapping[str, Any], prefix: str, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """`values` checked against the fields of dataclass `cls`, and brought to their types."""
    hints = get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls) if item.name not in without]
    typed = {}
    for key, value in values.items():
        if key not in names:
            raise ConfigError(f"{prefix}{key} is not a setting; there are {', '.join(names)}.")
        typed[key] = _value(f"{prefix}{key}", value, hints[key])
    return typed


def _value(name: str, value: Any, kind: Any) -> Any:
    if name.endswith("_bytes") and isinstance(value, str):
        return parse_bytes(value)
    if get_origin(kind) in (Union, types.UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        (kind,) = (option for option in get_args(kind) if option is not type(None))
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}.")
        return value
    if get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{name} must be a string or a list of strings, got {value!r}.")
        return tuple(items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        words = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
        raise ConfigError(f"{name} must be {words[kind]}, got {value!r}.")
    return value
