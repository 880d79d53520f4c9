"""A model that plays its part: what it reads is its real prompt, what it writes is what a model that calls tools in
Hermes' notation would write. It knows the weather only from tools, so an answer that has it right has gone all the way.

Knows one scene: questions about the weather of some cities. Does not know clients.
"""

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from scripted import INFO, ScriptedClient

from octavo.engine.grammar.grammars import CompiledGrammars
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.text.byte_tokenizer import EOS, ByteTokenizer
from octavo.engine.types import Request

CITIES = ("Paris", "Rome", "Oslo")
THOUGHT = "What do I know about the weather?"
SPEECH = """\
{%- if tools %}<|start|>tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call a tool like this:
<tool_call>
{"name": "its name", "arguments": {}}
</tool_call><|end|>
{% endif %}
{%- for message in messages %}<|start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|end|>
{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant
{% endif %}"""
# As Qwen3's: the model thinks first, unless its thought is closed before it began.
THOUGHTFUL_SPEECH = (
    SPEECH.replace(
        '{{ message.content or "" }}',
        "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
        '{{ message.content or "" }}',
    )
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Scene:
    """What the prompt says. results: of the tools called last. thinks: the answer begins with a thought."""

    tools: tuple[dict[str, Any], ...]
    question: str
    cities: tuple[str, ...]
    results: tuple[str, ...]
    thinks: bool

    @classmethod
    def of(cls, prompt: str, *, is_thoughtful: bool) -> "Scene":
        turns = re.findall(r"<\|start\|>(\w+)\n(.*?)<\|end\|>", prompt, re.DOTALL)
        lines = dict(turns).get("tools", "").split("\n")
        tools = [json.loads(line)["function"] for line in lines if line.startswith('{"type"')]
        question = next((text for role, text in reversed(turns) if role == "user"), prompt)
        results = []
        for role, text in reversed(turns):
            if role != "tool":
                break
            results.insert(0, text)
        cities = tuple(city for city in CITIES if city in question)
        thinks = is_thoughtful and not prompt.endswith("</think>\n\n")
        return cls(tuple(tools), question, cities, tuple(results), thinks)

    def reply(self, form: StructuredOutputs | None) -> str:
        thought = f"<think>\n{THOUGHT}\n</think>\n\n" if self.thinks else ""
        if self.tools and not self.results and (self.cities or (form is not None and form.kind == "grammar")):
            return thought + "\n".join(self._calls())
        schema = _schema(form)
        if schema is not None:
            return thought + json.dumps(fill(schema, schema, self._facts()))
        if form is not None and form.choice:
            return thought + next((choice for choice in form.choice if choice in self.question), form.choice[0])
        return thought + self._answer()

    def _calls(self) -> list[str]:
        tool = next((tool for tool in self.tools if tool["name"] in self.question), self.tools[0])
        cities = self.cities or CITIES[:1]
        schema = tool["parameters"]
        asked = [fill(schema, schema, {**self._facts(), "city": city, "location": city}) for city in cities]
        calls = [{"name": tool["name"], "arguments": arguments} for arguments in asked]
        return [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls]

    def _facts(self) -> dict[str, Any]:
        city = self.cities[0] if self.cities else CITIES[0]
        found = re.search(r"-?\d+", " ".join(self.results) or self.question)
        return {"city": city, "location": city, "celsius": int(found[0]) if found else 21, "sky": "sunny"}

    def _answer(self) -> str:
        if self.results:
            return "The tools say: " + "; ".join(result.strip() for result in self.results) + "."
        return f"You said “{self.question.strip()}”, and I know no more."


def fill(schema: dict[str, Any], root: dict[str, Any], facts: dict[str, Any], name: str = "") -> Any:
    """The smallest instance of `schema` that has the facts where it has a place of that name."""
    if "$ref" in schema:
        found = root
        for key in schema["$ref"].removeprefix("#/").split("/"):
            found = found[key]
        return fill(found, root, facts, name)
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return fill(schema[several][0], root, facts, name)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return facts[name] if facts.get(name) in schema["enum"] else schema["enum"][0]
    match schema.get("type", "object"):
        case "object":
            properties = schema.get("properties", {})
            wanted = [key for key in properties if key in schema.get("required", properties)]
            return {key: fill(properties[key], root, facts, key) for key in wanted}
        case "array":
            return [fill(schema.get("items", {}), root, facts, name.removesuffix("s"))]
        case "string":
            return str(facts.get(name, "so it is"))
        case "integer" | "number":
            return facts.get(name, 7)
        case "boolean":
            return True
        case _:
            return None


def _schema(form: StructuredOutputs | None) -> dict[str, Any] | None:
    """Of the JSON that the answer must be, also where it may be a call instead."""
    if form is None:
        return None
    if form.json_object:
        return {"type": "object", "properties": {"city": {"type": "string"}, "celsius": {"type": "integer"}}}
    alternative = re.search(r"^answer: %json (.*)$", form.grammar or "", re.MULTILINE)
    text = form.json or (alternative and alternative[1])
    return json.loads(text) if text else None


class Actor(ScriptedClient):
    """EngineClient of the model. is_thoughtful: it thinks before it answers. What is asked of the form of its outputs
    changes nothing for a model that does the right thing: a form that does not allow it is an error of the server's.
    """

    def __init__(self, *, is_thoughtful: bool = False, step: int = 5, delay_s: float = 0.0) -> None:
        info = replace(INFO, max_model_len=1 << 16)
        super().__init__(step=step, delay_s=delay_s, info_value=info, reply_of=self._play)
        self._is_thoughtful = is_thoughtful
        self._grammars = CompiledGrammars(ByteTokenizer, INFO.vocab_size, INFO.eos_token_ids)

    def _play(self, request: Request) -> str:
        prompt = ByteTokenizer().decode(request.prompt_token_ids, skip_special_tokens=False)
        form = request.params.structured_outputs
        reply = Scene.of(prompt, is_thoughtful=self._is_thoughtful).reply(form)
        return reply if form is None else self._in_form(reply, form)

    def _in_form(self, reply: str, form: StructuredOutputs) -> str:
        mark = bytes(form.begins_after).decode()
        assert mark in reply, f"the form waits for {mark!r}: {reply!r}"
        free, text = reply[: reply.index(mark) + len(mark)], reply[reply.index(mark) + len(mark) :]
        for allowed in (text, text.lstrip()):  # a sampler does not draw white space that its mask lacks
            if self._allows(allowed, form):
                return free + allowed
        raise AssertionError(f"{reply!r} is not allowed by {form}")

    def _allows(self, text: str, form: StructuredOutputs) -> bool:
        matcher = self._grammars.compile(form).result().matcher()
        for token in (*text.encode(), EOS):
            if matcher.ended:
                return token == EOS
            matcher.take(token)
        return matcher.error is None
