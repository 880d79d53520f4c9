"""Whatever a body holds, the answer is a 200 or a 4xx, in time, and the server answers correctly after."""

import asyncio
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.cluster.ingress.messages.body import BLOCKS, MessagesBody
from octavo.cluster.ingress.protocol import NOT_YET, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from octavo.cluster.ingress.responses.body import ITEMS, ResponsesBody

PATHS = {
    "/v1/completions": (CompletionBody, {"prompt": "Hi", "max_tokens": 5}),
    "/v1/chat/completions": (ChatBody, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}),
    "/v1/responses": (ResponsesBody, {"input": "Hi"}),
    "/v1/messages": (MessagesBody, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}),
    "/tokenize": (TokenizeBody, {"prompt": "Hi"}),
    "/detokenize": (DetokenizeBody, {"tokens": [1]}),
}
TEXT = st.text(max_size=5)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([-(2**63) - 1, 2**31, 2**63, 2**64, 10**40, 255, 256, 260, 261])
    | st.floats()
    | TEXT
    | st.sampled_from(["left", "right", "user", "text", "\x00", "\ud800", "<|end|>"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "role", "content", "include_usage", "5"]) | TEXT, inner, max_size=3
        )
    ),
    max_leaves=5,
)


@st.composite
def requests(draw):
    path = draw(st.sampled_from(sorted(PATHS)))
    kind, body = PATHS[path]
    names = st.sampled_from(sorted({*kind.model_fields, *NOT_YET})) | TEXT
    return path, {**body, **draw(st.dictionaries(names, VALUES, max_size=3))}


FIELDS = ["id", "name", "call_id", "arguments", "output", "input", "tool_use_id", "thinking", "summary", "is_error"]


@st.composite
def conversations(draw):
    """Items and blocks that have something wrong with them, or not."""
    kinds = st.sampled_from([*ITEMS, *(kind for known in BLOCKS.values() for kind in known), "input_text"])
    parts = st.dictionaries(st.sampled_from(["text", "content", *FIELDS]), VALUES, max_size=4)
    typed = st.builds(lambda kind, part: {**part, "type": kind}, kinds, parts)
    content = st.lists(typed, max_size=3) | VALUES
    turns = st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "assistant", "system", "developer", "tool"]),
        content,
    )
    if draw(st.booleans()):
        return "/v1/responses", {"input": draw(st.lists(typed | turns, max_size=4))}
    return "/v1/messages", {"max_tokens": 5, "messages": draw(st.lists(turns, max_size=4))}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests() | conversations())
def test_any_body(harness, drawn):
    path, body = drawn

    async def ask():
        async with asyncio.timeout(5), harness.http(harness.Client(), trust_request_chat_template=True) as http:
            response = await http.post(path, content=json.dumps(body).encode())
            assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
            if response.status_code != 200:
                assert response.json()["error"]["message"]
            good = await http.post("/v1/completions", json={"prompt": "Hi"})
            assert good.json()["choices"][0]["text"] == "Hello, world"

    asyncio.run(ask())
