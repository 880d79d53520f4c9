"""PoolerConfig: how an operator changes what a model's files say about pooling; vLLM's `--pooler-config`, in part."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

from octavo.engine.errors import ConfigError
from octavo.engine.pooling.params import PoolingType

_TYPES: dict[str, PoolingType] = {"LAST": "last", "MEAN": "mean", "CLS": "cls"}


@dataclass(frozen=True, slots=True)
class PoolerConfig:
    """None = as the model's files say. is_matryoshka: its embeddings may be shortened (`dimensions`)."""

    pooling_type: PoolingType | None = None
    normalize: bool | None = None
    is_matryoshka: bool = False


def parse_pooler_config(text: str | None) -> PoolerConfig:
    """From JSON, `{"pooling_type": "MEAN", "normalize": false}`. Raises ConfigError naming the key that is wrong."""
    if text is None:
        return PoolerConfig()
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"pooler_config is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError('pooler_config must be a JSON object, such as {"pooling_type": "MEAN"}.')
    values = {name: value for name, value in values.items() if value is not None}
    if "seq_pooling_type" in values:  # vLLM's newer name
        values["pooling_type"] = values.pop("seq_pooling_type")
    if "use_activation" in values:  # of embeddings, that is the norm
        values["normalize"] = values.pop("use_activation")
    known = [field.name for field in fields(PoolerConfig)]
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"pooler_config: {name} is not a setting here; there are {', '.join(known)}.")
        if name == "pooling_type":
            if str(value).upper() not in _TYPES:
                raise ConfigError(f"pooler_config: pooling_type must be one of {', '.join(_TYPES)}, got {value!r}.")
            values[name] = _TYPES[str(value).upper()]
        elif not isinstance(value, bool):
            raise ConfigError(f"pooler_config: {name} must be true or false, got {value!r}.")
    return PoolerConfig(**values)
