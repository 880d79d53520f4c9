"""Whatever a body holds, the answer is a 200 or a 4xx, in time, and the server answers correctly after."""

import asyncio
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.cluster.ingress.protocol import NOT_YET, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

PATHS = {
    "/v1/completions": (CompletionBody, {"prompt": "Hi", "max_tokens": 5}),
    "/v1/chat/completions": (ChatBody, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}),
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


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests())
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
