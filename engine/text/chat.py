"""Chat templates: messages → prompt text, rendered as transformers renders them.

Knows jinja, OpenAI's message shapes and the conventions of templates in the field. Does not know tokens. Templates come
with models and, if the server allows it, with requests: they run in jinja's sandbox and see plain values only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from octavo.engine.errors import RequestError
from octavo.engine.text.chat_format import ContentFormat, TemplateInput, inspect_template

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
# Stands at the end of the message to be continued; the rendered text is cut there. The space shows whether the template
# trims content.
_MARK = "<|octavo:continue-here|> "
# Names under which clients and templates know a message's reasoning.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """A model's templates by name, and the special tokens they may write (bos_token, eos_token …)."""

    by_name: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def default(self) -> str | None:
        """The template for a plain conversation; None if the model has none."""
        if "default" in self.by_name or len(self.by_name) != 1:
            return self.by_name.get("default")
        return next(iter(self.by_name.values()))

    def choose(self, chosen: str | None, tools: object) -> str:
        """The template `chosen` names or is; without it the model's own. Raises RequestError if there is none."""
        if chosen is not None:
            return self.by_name.get(chosen, chosen)
        template = self.by_name.get("tool_use") if tools else None
        template = template or self.default
        if template is None:
            raise RequestError(
                "This model has no chat template: start the server with one (--chat-template), pass chat_template, or "
                "use /v1/completions.",
                "messages",
            )
        return template

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        content_format: ContentFormat | None = None,
        arguments_as_text: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt. `kwargs` are further variables for the template (documents, enable_thinking …).

        content_format: how content is given to the template; None = found out from the template. arguments_as_text:
        arguments of calls are given as JSON text, as OpenAI writes them, and not as what it says.
        Raises RequestError, naming the field, for messages the template does not take.
        """
        compiled = compile_template(self.choose(chat_template, tools))
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: set one of them to false.",
                "continue_final_message",
            )
        variables = {**self.special_tokens, **kwargs}
        if clash := variables.keys() & {"messages", "tools", "add_generation_prompt"}:
            raise RequestError(f"chat_template_kwargs must not set {clash.pop()!r}.", "chat_template_kwargs")
        if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
            raise RequestError("tools must be a list of objects.", "tools")
        chat = prepare_messages(messages, compiled, content_format, arguments_as_text)
        ending = _mark_end(chat, compiled.source) if continue_final_message else None
        variables = {"documents": None, **variables}
        text = compiled.render(
            messages=chat,
            tools=_plain(tools),
            add_generation_prompt=add_generation_prompt,
            **{name: _plain(value) for name, value in variables.items()},
        )
        return text if ending is None else _cut_at_mark(text, ending)


@dataclass(frozen=True, slots=True)
class CompiledTemplate:
    source: str
    template: jinja2.Template
    takes: TemplateInput

    def render(self, **variables: Any) -> str:
        try:
            return self.template.render(**variables)
        except Exception as error:  # a template is a foreign program: it may raise anything, and only on these messages
            raise RequestError(f"The chat template does not take these messages: {error}", "messages") from error


@lru_cache(maxsize=64)
def compile_template(source: str) -> CompiledTemplate:
    """Raises RequestError if `source` is no jinja template."""
    environment = _environment()
    try:
        tree = environment.parse(source)
        return CompiledTemplate(source, environment.from_string(source), inspect_template(tree))
    except (jinja2.TemplateError, RecursionError) as error:
        raise RequestError(f"The chat template is not a jinja template: {error}", "chat_template") from error


def detect_content_format(source: str) -> ContentFormat:
    """ "openai" if the template loops over content as a list of parts, else "string"."""
    return compile_template(source).takes.content_format


# ---- messages


def prepare_messages(
    messages: Sequence[Message],
    template: CompiledTemplate,
    content_format: ContentFormat | None = None,
    arguments_as_text: bool = False,
) -> list[dict[str, Any]]:
    """Plain copies of `messages` in the form the template takes. The caller's messages are not changed."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError("messages must be a list of at least one message.", "messages")
    takes = template.takes
    if content_format is not None and content_format != takes.content_format:
        takes = TemplateInput(content_format, takes_strings=content_format == "string", takes_none=False)
    knows_developer = '"developer"' in template.source or "'developer'" in template.source
    return [_prepare(message, at, takes, knows_developer, arguments_as_text) for at, message in enumerate(messages)]


def _prepare(
    message: Message, at: int, takes: TemplateInput, knows_developer: bool, arguments_as_text: bool
) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"messages[{at}] must be an object with a role.", "messages")
    # Templates ask whether a key is there, so a null must not be.
    plain: dict[str, Any] = _plain({key: value for key, value in message.items() if value is not None})
    if plain["role"] == "developer" and not knows_developer:
        plain["role"] = "system"
    plain["content"] = _content(plain.get("content"), at, takes)
    if "tool_calls" in plain:
        _prepare_tool_calls(plain, at, arguments_as_text)
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _content(content: Any, at: int, takes: TemplateInput) -> Any:
    if content is None:
        return None if takes.takes_none else ("" if takes.takes_strings else [])
    if isinstance(content, str):
        return content if takes.takes_strings else [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RequestError(f"messages[{at}].content must be a string or a list of parts.", "messages")
    parts = [_part(part, f"messages[{at}].content[{number}]") for number, part in enumerate(content)]
    return parts if takes.content_format == "openai" else "\n".join(part["text"] for part in parts)


def _part(part: Any, place: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else None
    name = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if name is None:
        raise RequestError(f"{place}: parts of type {kind!r} are not served here, only text.", "messages")
    if not isinstance(part.get(name), str):
        raise RequestError(f"{place}.{name} must be a string.", "messages")
    return {**part, "type": "text", "text": part[name]}


def _prepare_tool_calls(message: dict[str, Any], at: int, as_text: bool) -> None:
    """OpenAI writes a call's arguments as JSON text; most templates expect the object."""
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        raise RequestError(f"messages[{at}].tool_calls must be a list.", "messages")
    if not calls:
        del message["tool_calls"]  # templates take its presence for a call
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise RequestError(f"messages[{at}].tool_calls[{number}] must be an object with a function.", "messages")
        arguments = function.get("arguments")
        if isinstance(arguments, str) and not as_text:
            function["arguments"] = _parse_arguments(arguments)
        elif arguments is None:
            function["arguments"] = "{}" if as_text else {}


def _parse_arguments(arguments: str) -> Any:
    if not arguments.strip():
        return {}
    try:
        return json.loads(arguments)
    except json.JSONDecodeError:
        # A model wrote it, in an earlier turn: refusing it would make the conversation impossible to go on with.
        logger.warning("A tool call in a conversation has arguments that are not JSON; they are left out.")
        return {}


def _plain(value: Any) -> Any:
    """Rebuilt from JSON's types: objects with methods do not belong into a sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):  # here and below: subclasses, such as an enum's members
        return str.__str__(value)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if callable(dump := getattr(value, "model_dump", None)):
        return _plain(dump())
    return f"<{type(value).__name__}>"


# ---- continuing the final message


def _mark_end(chat: list[dict[str, Any]], source: str) -> str:
    """Put the mark behind the final message's text; → that text."""
    final = chat[-1]
    content = final["content"]
    if isinstance(content, str) and "content" in source:
        final["content"] = content + _MARK
        return content
    if isinstance(content, list):
        for part in reversed(content):
            text: str = part["text"]
            part["text"] = text + _MARK
            return text
    raise RequestError("continue_final_message: the final message has no text to continue.", "messages")


def _cut_at_mark(text: str, ending: str) -> str:
    at = text.rfind(_MARK.strip())
    if at < 0 or ending.strip() not in text:
        raise RequestError(
            "continue_final_message: the chat template leaves out or changes the final message.", "messages"
        )
    if text.startswith(_MARK, at):
        return text[:at]
    return text[:at].rstrip()  # the template trims content, so the prompt must end in the trimmed text


# ---- jinja


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: marks the assistant's text for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        # A scope, as in transformers, where the body becomes a macro: what it sets is not seen outside.
        line = parser.stream.current.lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body).set_lineno(line)]


class _Namespace(Namespace):
    """jinja's namespace, which must not be a way to underscore names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` stays free as a name, as in jinja
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict(…)` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace must not hold {name!r}: it starts with an underscore")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own filter escapes HTML, which a prompt must not be."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment
