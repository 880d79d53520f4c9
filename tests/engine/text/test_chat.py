"""Chat templates: the same text as transformers renders, and a RequestError wherever a client can be wrong."""

from __future__ import annotations

import copy
import enum
from typing import Any

import pytest
import tokenizers

from octavo.engine.errors import RequestError
from octavo.engine.text.chat import ChatTemplates, compile_template, detect_content_format

from .conftest import CHATML

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""  # noqa: E501 (a template's line)
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.tool_calls is defined) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {%- generation %}{{- " " + message["content"]|trim + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
TOOLS_AND_THOUGHTS = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last_user=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" %}
        {%- set ns.last_user = (messages|length - 1) - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content is string and loop.index0 > ns.last_user %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content.lstrip('\\n') }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' + tool_call.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""  # noqa: E501 (a template's line)
PARTS = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS_ONLY = (
    "{% set chat = messages %}{% for m in chat %}{{ m.role }}:"
    "{% for item in m.content %}{{ item.text }}{% endfor %};{% endfor %}"
)
MACRO = (
    "{% macro show(body) %}{% if body is string %}{{ body }}{% else %}{% for p in body %}[{{ p.text }}]{% endfor %}"
    "{% endif %}{% endmacro %}{% for m in messages %}{{ show(m.content) }}\n{% endfor %}"
)

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": '  Why < is & "quoted"? 🎉 '}
TALK = [USER, {"role": "assistant", "content": "Because."}, {"role": "user", "content": "And now?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für <Ort>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLS = [
    {"role": "user", "content": "Weather in Köln?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "12 °C"},
]


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)


def ours(template: str, messages: Any, **options: Any) -> str:
    return ChatTemplates({"default": template}, SPECIAL_TOKENS).render(messages, **options)


SYSTEM = [{"role": "system", "content": "Be brief. "}, *TALK]
THOUGHTS = [USER, {"role": "assistant", "content": "Yes.", "reasoning": "Hm\n"}]
CASES = [
    *[(template, TALK, {}) for template in (CHATML, LLAMA3, MISTRAL, GEMMA, TOOLS_AND_THOUGHTS, PARTS, MACRO)],
    *[(template, SYSTEM, {}) for template in (CHATML, LLAMA3, MISTRAL, TOOLS_AND_THOUGHTS, PARTS)],
    *[(template, TALK, {"add_generation_prompt": False}) for template in (CHATML, LLAMA3, GEMMA)],
    *[(template, CALLS, {"tools": [TOOL]}) for template in (LLAMA3, TOOLS_AND_THOUGHTS)],
    (TOOLS_AND_THOUGHTS, TALK, {"enable_thinking": False}),
    (TOOLS_AND_THOUGHTS, THOUGHTS, {}),
    ("{{ strftime_now('%Y') }}{{ dict(a=1).a }}{{ {'b': messages} | tojson }}", TALK, {}),
    ("{{ documents[0].title }}", TALK, {"documents": [{"title": "T", "text": "x"}]}),
    ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", TALK, {}),
    ("  {% if true %}\n  a\n  {% endif %}\n  b {{- ' c' -}}  \n d\n", TALK, {}),
    ("{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", TALK, {}),
]


@pytest.mark.parametrize(("template", "messages", "options"), CASES)
def test_renders_what_transformers_renders(theirs: Any, template: str, messages: list, options: dict) -> None:
    options = {"add_generation_prompt": True, **options}
    before = copy.deepcopy(messages)
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    assert ours(template, messages, **options) == expected
    assert messages == before


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, GEMMA, TOOLS_AND_THOUGHTS, PARTS])
@pytest.mark.parametrize("ending", ["Because", "Because ", "Because\n\n", "  B", ""])
def test_continues_the_final_message_as_transformers_does(theirs: Any, template: str, ending: str) -> None:
    messages = [USER, {"role": "assistant", "content": ending}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    assert ours(template, messages, **options) == expected


def test_content_format_is_found_out_from_the_template() -> None:
    for template in (CHATML, LLAMA3, MISTRAL, GEMMA, TOOLS_AND_THOUGHTS):
        assert detect_content_format(template) == "string"
    for template in (PARTS, PARTS_ONLY, MACRO):
        assert detect_content_format(template) == "openai"
    namespaced = (
        "{% set ns = namespace() %}{% set ns.m = messages %}"
        "{% for x in ns.m %}{% for c in x['content'] %}{% endfor %}{% endfor %}"
    )
    assert detect_content_format(namespaced) == "openai"
    assert detect_content_format("{% for t in tools %}{% for c in t.content %}{% endfor %}{% endfor %}") == "string"


def test_parts_become_text_where_the_template_wants_text() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ours(CHATML, parts, add_generation_prompt=False) == "<|im_start|>user\na\nb<|im_end|>\n"
    assert ours(PARTS, parts) == "<user>ab<assistant>"
    assert ours(PARTS, [{"role": "user", "content": "ab"}]) == "<user>ab<assistant>"
    assert ours(PARTS_ONLY, [{"role": "user", "content": "ab"}]) == "user:ab;"
    assert ours(PARTS, parts, content_format="string") == "<user>a\nb<assistant>"
    continued = [*parts, {"role": "assistant", "content": [{"type": "text", "text": "c"}]}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert ours(PARTS, continued, **options) == "<user>ab<assistant>c"


def test_openai_shapes_are_made_fit_for_templates() -> None:
    spoken = copy.deepcopy(CALLS)
    spoken[1]["content"] = None
    spoken[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Köln"}'
    spoken[1]["refusal"] = None
    for template in (LLAMA3, TOOLS_AND_THOUGHTS):
        assert ours(template, spoken, tools=[TOOL]) == ours(template, CALLS, tools=[TOOL])
    spoken[1]["tool_calls"][0]["function"]["arguments"] = "{broken"
    assert '"arguments": {}' in ours(TOOLS_AND_THOUGHTS, spoken)
    assert "None" not in ours(CHATML, [{"role": "assistant", "content": None}])
    asks = "{% for m in messages %}{{ 'call' if m.content is none else m.content }}{% endfor %}"
    assert ours(asks, [{"role": "assistant", "content": None}]) == "call"
    assert ours(LLAMA3, [USER, {"role": "assistant", "content": "x", "tool_calls": []}]).count("assistant") == 2
    developer = [{"role": "developer", "content": "d"}]
    assert "system" in ours(CHATML, developer)
    assert ours("{% if messages[0].role == 'developer' %}yes{% endif %}", developer) == "yes"


class _Colour(enum.StrEnum):
    RED = "red"


class _Model:
    def model_dump(self) -> dict:
        return {"a": 1}


def test_templates_see_plain_values_only() -> None:
    render = ChatTemplates({"default": "{{ a }} {{ b | tojson }} {{ c }}"}).render
    assert render(TALK, a=_Colour.RED, b=_Model(), c=object()) == 'red {"a": 1} <object>'
    for attack in (
        "{{ messages.__class__.__mro__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ dict.__call__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ range(10000000) | length }}",
    ):
        with pytest.raises(RequestError):
            ours(attack, TALK)


@pytest.mark.parametrize(
    ("template", "messages", "options", "param", "says"),
    [
        (GEMMA, SYSTEM, {}, "messages", "System role not supported"),
        (MISTRAL, [USER, USER], {}, "messages", "must alternate"),
        (CHATML, [], {}, "messages", "at least one"),
        (CHATML, "hi", {}, "messages", "must be a list"),
        (CHATML, ["hi"], {}, "messages", r"messages\[0\]"),
        (CHATML, [{"content": "x"}], {}, "messages", "role"),
        (CHATML, [{"role": "user", "content": 3}], {}, "messages", "string or a list"),
        (CHATML, [{"role": "user", "content": [{"type": "image_url"}]}], {}, "messages", "'image_url'"),
        (CHATML, [{"role": "user", "content": [{"type": "text"}]}], {}, "messages", "text must be a string"),
        (CHATML, [{"role": "user", "content": [3]}], {}, "messages", r"content\[0\]"),
        (CHATML, [{"role": "assistant", "tool_calls": ["x"]}], {}, "messages", "tool_calls"),
        (CHATML, [{"role": "assistant", "tool_calls": 3}], {}, "messages", "must be a list"),
        ("{{ 1 / 0 }}", TALK, {}, "messages", "division"),
        ("{% if %}", TALK, {}, "chat_template", "not a jinja template"),
        (CHATML, TALK, {"tools": ["x"]}, "tools", "list of objects"),
        (CHATML, TALK, {"continue_final_message": True}, "continue_final_message", "exclude each other"),
        (
            "nothing of the content",
            TALK,
            {"continue_final_message": True, "add_generation_prompt": False},
            "messages",
            "leaves out",
        ),
        (
            CHATML.replace("message['content']", "message['content'] | upper"),
            TALK,
            {"continue_final_message": True, "add_generation_prompt": False},
            "messages",
            "changes",
        ),
    ],
)
def test_what_a_template_does_not_take_is_the_clients_error(
    template: str, messages: Any, options: dict, param: str, says: str
) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        ours(template, messages, **options)
    assert caught.value.param == param


def test_template_variables_cannot_be_taken_over() -> None:
    with pytest.raises(RequestError, match="'messages'"):
        ChatTemplates({"default": CHATML}, {"messages": "x"}).render(TALK)


def test_a_model_without_a_template_says_what_to_do() -> None:
    with pytest.raises(RequestError, match="chat_template"):
        ChatTemplates().render(TALK)
    assert ChatTemplates().render(TALK, chat_template="{{ messages | length }}") == "3"


def test_templates_by_name() -> None:
    templates = ChatTemplates({"default": "plain", "tool_use": "tools", "rag": "documents"})
    assert templates.render(TALK) == "plain"
    assert templates.render(TALK, tools=[TOOL]) == "tools"
    assert templates.render(TALK, chat_template="rag") == "documents"
    assert ChatTemplates({"only": "one"}).default == "one"


def test_templates_are_compiled_once() -> None:
    assert compile_template(LLAMA3) is compile_template(LLAMA3)
