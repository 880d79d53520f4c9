"""What chat templates of the field's kinds can do with tools, found by trying; and conversations in their ways."""

import pytest

from octavo.cluster.ingress.protocol import ChatBody, body_of
from octavo.cluster.ingress.tool_prompt import ToolPrompt
from octavo.cluster.ingress.tools import tools_of
from octavo.engine.text.byte_tokenizer import ByteTokenizer

LOOP = "{% for m in messages %}"
END = "{% endfor %}<|assistant|>"
TOOLS = "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }}{% endfor %}"
PLAIN = LOOP + "<|{{ m.role }}|>{{ m.content }}" + END
OPENAI = LOOP + "<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}" + "{CALL}{% endfor %}" + END
ARGUMENTS = "{{ c.function.arguments | tojson }}"


def writing(call):
    return TOOLS + OPENAI.replace("{CALL}", call)


HERMES = writing('\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": ' + ARGUMENTS + "}\n</tool_call>")
# one call a turn, as JSON and nothing else, with a line end before it
LLAMA = (
    LOOP
    + "{% if m.tool_calls and m.tool_calls | length != 1 %}{{ raise_exception('One!') }}{% endif %}{% endfor %}"
    + writing('{{ "\\n" }}{"name": "{{ c.function.name }}", "parameters": ' + ARGUMENTS + "}")
)
# ids of nine characters
MISTRAL = (
    LOOP
    + "{% if m.tool_call_id and m.tool_call_id | length != 9 %}{{ raise_exception('Nine!') }}{% endif %}{% endfor %}"
    + writing('[TOOL_CALLS] [{"name": "{{ c.function.name }}", "arguments": ' + ARGUMENTS + ', "id": "{{ c.id }}"}]')
)
# arguments are text, and a turn that calls has no content
DEEPSEEK = (
    LOOP
    + "{% if m.role == 'assistant' and m.content is none %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}"
    + "{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + c.function.name + '\n```json\n' + c.function.arguments }}"
    + "{{ '\n```<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>"
    + "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}"
    + END
)
CODER = writing(
    "\n<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments | items %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
)
FOREIGN = writing("<tool_calls>\n" + '{"name": "{{ c.function.name }}", "arguments": ' + ARGUMENTS + "}\n</tool_calls>")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No!') }}{% endif %}" + PLAIN
BROKEN = "{{ raise_exception('No!') }}"


@pytest.mark.parametrize(
    ("template", "notation", "skills"),
    [
        (HERMES, "hermes", {"tools": True, "calls": True, "parallel": True, "system": True, "long_ids": True}),
        (LLAMA, "llama3_json", {"calls": True, "parallel": False}),
        (MISTRAL, "mistral", {"calls": True, "parallel": True, "long_ids": False}),
        (DEEPSEEK, "deepseek_v3", {"tools": False, "calls": True, "arguments_as_text": True, "blank": None}),
        (CODER, "qwen3_coder", {"tools": True, "calls": True}),
        (FOREIGN, None, {"tools": True, "calls": True}),
        (PLAIN, None, {"tools": False, "calls": False, "system": True}),
        (NO_SYSTEM, None, {"tools": False, "calls": False, "system": False}),
        (BROKEN, None, {"tools": False, "calls": False, "system": False}),
    ],
    ids=["hermes", "llama", "mistral", "deepseek", "coder", "foreign", "plain", "no system", "broken"],
)
def test_skills(template, notation, skills):
    found = ToolPrompt(ByteTokenizer(), None).skills(template)
    assert (found.notation.name if found.notation else None) == notation
    assert {name: getattr(found, name) for name in skills} == skills


@pytest.mark.parametrize("template", [HERMES, LLAMA, MISTRAL, DEEPSEEK, CODER, FOREIGN, PLAIN, NO_SYSTEM])
def test_a_conversation_gets_into_every_template(template):
    """With content that is null, ids of another server, several calls, and results in another order."""
    function = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object", "properties": {}}}
    body = {"messages": [], "tools": [{"type": "function", "function": function}]}
    tools = tools_of(body_of(ChatBody, body))
    made = [
        {
            "id": f"call_abcdef{n}",
            "type": "function",
            "function": {"name": "weather", "arguments": f'{{"city": "{city}"}}'},
        }
        for n, city in enumerate(["Köln", "Bonn"])
    ]
    talk = [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": None, "tool_calls": made},
        {"role": "tool", "tool_call_id": "call_abcdef1", "content": "rain in Bonn"},
        {"role": "tool", "tool_call_id": "call_abcdef0", "content": [{"type": "text", "text": "sun in Köln"}]},
        {"role": "user", "content": "Again!"},
    ]
    prepared = ToolPrompt(ByteTokenizer(), None).prepare(talk, tools, template)
    text = ByteTokenizer().apply_chat_template(
        prepared.messages,
        tools=prepared.tools,
        chat_template=template,
        arguments_as_text=prepared.arguments_as_text,
    )
    assert text.index("Tells it.") < text.index("How is it?")
    for said in ("Tells it.", "rain in Bonn", "sun in Köln", "Again!"):
        assert text.count(said) == 1, said
    for city in ("Köln", "Bonn"):
        assert text.count(city) == 2
