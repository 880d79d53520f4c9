"""Which reader a model needs: parsers by the names that vLLM has for them, and what a chat template tells of its model.

A CallFormat can also write: the text around a call's name and arguments, from which a grammar is made when calls are
enforced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from octavo.cluster.ingress.reading import deepseek
from octavo.cluster.ingress.reading.calls import Offer
from octavo.cluster.ingress.reading.deepseek import DeepSeekV3Reader, DeepSeekV31Reader
from octavo.cluster.ingress.reading.hermes import HermesReader
from octavo.cluster.ingress.reading.lists import JsonListReader, PhiReader
from octavo.cluster.ingress.reading.llama import LlamaJsonReader
from octavo.cluster.ingress.reading.mistral import MistralReader
from octavo.cluster.ingress.reading.parts import PlainReader, Reader
from octavo.cluster.ingress.reading.pythonic import PythonicReader
from octavo.cluster.ingress.reading.qwen_coder import QwenCoderReader
from octavo.cluster.ingress.reading.thinking import Thinking
from octavo.engine.errors import ConfigError

NAME = "{name}"


@dataclass(frozen=True, slots=True)
class Shape:
    """How calls with JSON arguments are written: first, begin with NAME in it, the arguments, end, between and begin of
    the next call …, last.
    """

    begin: str
    end: str
    between: str = ""
    first: str = ""
    last: str = ""


@dataclass(frozen=True, slots=True)
class CallFormat:
    """shape: None = calls cannot be written as JSON between fixed texts. trigger: what each call begins with, "" if
    nothing tells a call from text before it is read. markers: of the notation, those that may be special tokens.
    """

    name: str
    reader: Callable[[Offer], Reader]
    shape: Shape | None = None
    trigger: str = ""
    markers: tuple[str, ...] = ()


HERMES_SHAPE = Shape(begin='<tool_call>\n{"name": "{name}", "arguments": ', end="}\n</tool_call>", between="\n")
_LIST = {"begin": '{"name": "{name}", "arguments": ', "end": "}", "between": ", "}
_DEEPSEEK = (deepseek.FIRST, deepseek.BEGIN, deepseek.SEPARATOR, deepseek.END, deepseek.LAST)
_TAGS = ("<tool_call>", "</tool_call>")

HERMES = CallFormat("hermes", HermesReader, HERMES_SHAPE, "<tool_call>", _TAGS)
NO_CALLS = CallFormat("none", lambda offer: PlainReader())
# For calls that are enforced where the model's own notation is not known, or is not JSON.
JSON_LIST = CallFormat(
    "json_list", JsonListReader, Shape('{"name": "{name}", "parameters": ', "}", ", ", first="[", last="]")
)
_LLAMA3 = CallFormat(
    "llama3_json",
    LlamaJsonReader,
    Shape(begin='{"name": "{name}", "parameters": ', end="}", between="; "),
    markers=("<|python_tag|>",),
)
_PYTHONIC = CallFormat("pythonic", PythonicReader, markers=("<|python_start|>", "<|python_end|>"))
_QWEN_CODER = CallFormat("qwen3_coder", QwenCoderReader, trigger="<tool_call>", markers=_TAGS)

CALL_FORMATS: Mapping[str, CallFormat] = {
    "deepseek_v3": CallFormat(
        "deepseek_v3",
        DeepSeekV3Reader,
        Shape(
            begin=f"{deepseek.BEGIN}function{deepseek.SEPARATOR}{NAME}\n```json\n",
            end=f"\n```{deepseek.END}",
            between="\n",
            first=deepseek.FIRST,
            last=deepseek.LAST,
        ),
        deepseek.FIRST,
        _DEEPSEEK,
    ),
    "deepseek_v31": CallFormat(
        "deepseek_v31",
        DeepSeekV31Reader,
        Shape(
            begin=f"{deepseek.BEGIN}{NAME}{deepseek.SEPARATOR}",
            end=deepseek.END,
            first=deepseek.FIRST,
            last=deepseek.LAST,
        ),
        deepseek.FIRST,
        _DEEPSEEK,
    ),
    "hermes": HERMES,
    "json_list": JSON_LIST,
    "llama3_json": _LLAMA3,
    "llama4_json": _LLAMA3,
    "llama4_pythonic": _PYTHONIC,
    "none": NO_CALLS,
    "mistral": CallFormat(
        "mistral",
        MistralReader,
        Shape(**_LIST, first="[TOOL_CALLS][", last="]"),
        "[TOOL_CALLS]",
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    ),
    "phi4_mini_json": CallFormat(
        "phi4_mini_json",
        PhiReader,
        Shape(**_LIST, first="<|tool_call|>[", last="]<|/tool_call|>"),
        "<|tool_call|>",
        ("<|tool_call|>", "<|/tool_call|>"),
    ),
    "pythonic": _PYTHONIC,
    "qwen3_coder": _QWEN_CODER,
    "qwen3_json": HERMES,
    "qwen3_xml": _QWEN_CODER,
}

THINKING: Mapping[str, Thinking | None] = {
    "deepseek_r1": Thinking(always=True),
    "deepseek_v3": Thinking(),
    "glm45": Thinking(),
    "mistral": Thinking("[THINK]", "[/THINK]"),
    "none": None,
    "qwen3": Thinking(),
    "seed_oss": Thinking("<seed:think>", "</seed:think>"),
    "think": Thinking(),
}


def call_format(name: str) -> CallFormat:
    """Raises ConfigError for a name that is none."""
    if name not in CALL_FORMATS:
        raise ConfigError(f"tool_call_parser must be one of {', '.join(CALL_FORMATS)}, got {name!r}.")
    return CALL_FORMATS[name]


def thinking(name: str) -> Thinking | None:
    """Raises ConfigError for a name that is none."""
    if name not in THINKING:
        raise ConfigError(f"reasoning_parser must be one of {', '.join(THINKING)}, got {name!r}.")
    return THINKING[name]


def guess_thinking(template: str) -> Thinking | None:
    """How the model marks thoughts, if the chat template speaks of it. Whether there is one, prompt and answer show."""
    return THINKING["think"] if "<think>" in template or "</think>" in template else None
