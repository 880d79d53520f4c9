"""The server against its own OpenAPI document: whatever the document allows, and much that it does not, is answered in
time, with a status and a body that the document knows, and the server answers correctly after.
"""

import time

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks
from starlette.testclient import TestClient

EXAMPLES = 14  # per operation
LONGEST_S = 5.0
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def app(harness):
    return harness.app(harness.Client(), trust_request_chat_template=True)


def operations(app):
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    return [result.ok() for result in schema.get_all_operations()]


def exercise(operation, examples, **call):
    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy())
    def once(case):
        began = time.monotonic()
        response = case.call(**call)
        assert time.monotonic() - began < LONGEST_S
        case.validate_response(response, checks=CHECKS)

    once()


def test_every_operation_is_answered_as_the_document_says(app, harness):
    for operation in operations(app):
        exercise(operation, EXAMPLES)
    answer = TestClient(app).post("/v1/completions", json={"prompt": "Hi"}).json()
    assert answer["choices"][0]["text"] == "Hello, world"


def test_over_a_socket_it_is_the_same(harness):
    with harness.server(harness.Client()) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        for result in schema.get_all_operations():
            exercise(result.ok(), 2)
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi"}).json()
    assert answer["choices"][0]["text"] == "Hello, world"
