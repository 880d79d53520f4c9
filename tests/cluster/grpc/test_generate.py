"""Generate and GenerateUnary: what is asked reaches the engine, and what it answers the client."""

import asyncio
import json
import random

import grpc
import httpx
import pytest
from fakes import until
from google.protobuf.message import DecodeError
from scripted import logprobs_of

from octavo.cluster.ingress.app import create_app
from octavo.cluster.ingress.client import ReplicaLost
from octavo.engine.beam import Beams
from octavo.engine.errors import CapacityError, RankLost, StepError
from octavo.engine.grammar.spec import StructuredOutputs
from octavo.engine.params import SamplingParams
from octavo.engine.types import GenerationDefaults
from octavo.protos.octavo.v1 import inference_pb2 as pb
from octavo.protos.octavo.v1 import sampling_pb2

ALL = {
    "n": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.5,
    "temperature": 0.75,
    "top_p": 0.5,
    "top_k": 7,
    "min_p": 0.25,
    "seed": -12,
    "stop": ("xx", "yy"),
    "stop_token_ids": (3, 4),
    "ignore_eos": True,
    "max_tokens": 33,
    "min_tokens": 5,
    "logprobs": 2,
    "prompt_logprobs": 1,
    "detokenize": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "include_stop_str_in_output": True,
    "logit_bias": {5: 1.5, 7: -100.0},
    "allowed_token_ids": (1, 2, 3),
    "bad_words": ("bad", "word"),
    "skip_reading_prefix_cache": True,
    "logprob_token_ids": (7, 8),
}


def ask(text="Hi", **fields):
    return pb.GenerationRequest(text=text, **fields)


async def read(call):
    return [chunk async for chunk in call]


async def failure(call, about=""):
    """(code, details, trailing metadata) of a call that fails, and how many messages it brought."""
    messages = 0
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                messages += 1
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details(), dict(error.trailing_metadata()), messages
    pytest.fail(f"it went well: {about}")


@pytest.mark.parametrize("prompt", [{"text": "Hi"}, {"chat": {"messages": [{"role": "user", "content": "Hi"}]}}])
async def test_every_sampling_parameter_reaches_the_engine(harness, prompt):
    fields = {field.name for field in sampling_pb2.SamplingParams.DESCRIPTOR.fields}
    assert ALL.keys() == fields - {"beams", "structured_outputs"}
    engine = harness.Client()
    async with harness.serving(engine) as server:
        params = sampling_pb2.SamplingParams(**ALL)
        await server.stub.GenerateUnary(
            pb.GenerationRequest(**prompt, params=params, priority=-3, cache_salt="salt", session_id="conversation")
        )
    (request,) = engine.seen
    assert request.params == SamplingParams(**ALL)
    assert (request.priority, request.cache_salt, request.session_id) == (-3, "salt", "conversation")
    assert request.bad_words_token_ids


@pytest.mark.parametrize("prompt", [{"text": "Hi"}, {"chat": {"messages": [{"role": "user", "content": "Hi"}]}}])
async def test_searches_and_forms_reach_the_engine(harness, prompt):
    engine = harness.Client()
    beams = {"width": 4, "length_penalty": 0.5, "early_stopping": sampling_pb2.Beams.EARLY_STOPPING_NEVER}
    async with harness.serving(engine) as server:
        for params in (sampling_pb2.SamplingParams(n=2, beams=beams), sampling_pb2.SamplingParams(n=1)):
            await server.stub.GenerateUnary(pb.GenerationRequest(**prompt, params=params))
        form = sampling_pb2.SamplingParams(structured_outputs={"choice": ["a", "b"]})
        await server.stub.GenerateUnary(pb.GenerationRequest(**prompt, params=form))
        wrong = sampling_pb2.SamplingParams(beams={"width": 4, "early_stopping": 9})
        code, details, _, _ = await failure(server.stub.GenerateUnary(pb.GenerationRequest(**prompt, params=wrong)))
    assert [request.params.beams for request in engine.seen] == [Beams(4, 0.5, "never"), None, None]
    assert engine.seen[2].params.structured_outputs == StructuredOutputs(choice=("a", "b"))
    assert code == grpc.StatusCode.INVALID_ARGUMENT, details


async def test_what_is_absent_is_as_over_http(harness):
    """The same defaults and prompts as the bodies of HTTP."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    asked = [
        (pb.GenerationRequest(text="Hi"), "/v1/completions", {"prompt": "Hi"}),
        (pb.GenerationRequest(token_ids={"ids": [1, 2, 3]}), "/v1/completions", {"prompt": [1, 2, 3]}),
        (pb.GenerationRequest(chat={"messages": messages}), "/v1/chat/completions", {"messages": messages}),
        (
            pb.GenerationRequest(text="Hello", truncate_prompt_tokens=2, truncation_side=2, add_special_tokens=False),
            "/v1/completions",
            {"prompt": "Hello", "truncate_prompt_tokens": 2, "truncation_side": "right", "add_special_tokens": False},
        ),
    ]
    defaults = GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20)
    for rpc, path, body in asked:
        engine = harness.Client()
        async with harness.serving(engine, defaults=defaults) as server:
            answer = await server.stub.GenerateUnary(rpc)
            transport = httpx.ASGITransport(create_app(server.services))
            async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as http:
                choice = (await http.post(path, content=json.dumps(body))).json()["choices"][0]
        over_grpc, over_http = engine.seen
        assert over_grpc.prompt_token_ids == over_http.prompt_token_ids
        assert over_grpc.params.replace(seed=0) == over_http.params.replace(seed=0)
        assert answer.outputs[0].text == choice.get("text", choice.get("message", {}).get("content"))


async def test_max_tokens_0_is_what_the_context_has_room_for(harness):
    engine = harness.Client()
    async with harness.serving(engine) as server:
        await server.stub.GenerateUnary(ask(params={"max_tokens": 0}))
        await server.stub.GenerateUnary(ask())
    room = harness.info.max_model_len - len(engine.seen[0].prompt_token_ids)
    assert [request.params.max_tokens for request in engine.seen] == [room, 16]


@pytest.mark.parametrize("step", [1, 3, 100])
async def test_a_stream_is_the_whole_answer_in_pieces(harness, step):
    engine = harness.Client(replies=("Hello, wörld 🌍", "Goodbye"), step=step)
    request = ask(
        params={"n": 2, "logprobs": 2, "prompt_logprobs": 1, "max_tokens": 50},
        return_token_ids=True,
        return_prompt_token_ids=True,
        request_id="mine",
    )
    async with harness.serving(engine) as server:
        whole = await server.stub.GenerateUnary(request)
        chunks = await read(server.stub.Generate(request))
    assert [output.text for output in whole.outputs] == ["Hello, wörld 🌍", "Goodbye"]
    assert [output.finish_reason for output in whole.outputs] == [pb.Output.FINISH_REASON_STOP] * 2
    for index, output in enumerate(whole.outputs):
        parts = [part for chunk in chunks for part in chunk.outputs if part.index == index]
        assert "".join(part.text for part in parts) == output.text
        assert [token for part in parts for token in part.token_ids] == list(output.token_ids)
        assert [entry for part in parts for entry in part.logprobs] == list(output.logprobs)
        assert [part.finish_reason for part in parts] == [0] * (len(parts) - 1) + [output.finish_reason]
        assert len(output.logprobs) == len(output.token_ids)
    expected = logprobs_of(ord("H"), 2)
    entry = whole.outputs[0].logprobs[0]
    assert (entry.token.token_id, entry.token.rank, entry.token.text) == (ord("H"), 2, "H")
    assert [candidate.token_id for candidate in entry.top] == list(expected.token_ids[1:])
    assert [candidate.rank for candidate in entry.top] == [1, 2]
    assert len(whole.prompt.logprobs) == len(whole.prompt.token_ids) == whole.usage.prompt_tokens
    assert not whole.prompt.logprobs[0].HasField("token")
    assert whole.prompt.logprobs[1].HasField("token")
    first, *_, last = chunks
    assert (
        (first.id, first.model, first.prompt)
        == (whole.id, whole.model, whole.prompt)
        == (
            "gen-mine",
            "scripted",
            whole.prompt,
        )
    )
    assert last.usage == whole.usage
    assert (whole.usage.completion_tokens, whole.usage.cached_tokens) == (
        sum(len(o.token_ids) for o in whole.outputs),
        3,
    )
    assert not any(chunk.HasField("usage") for chunk in chunks[:-1])


async def test_stops(harness):
    engine = harness.Client(replies=("one two three",))
    async with harness.serving(engine) as server:
        stopped = await server.stub.GenerateUnary(ask(params={"stop": [" th"]}))
        limited = await server.stub.GenerateUnary(ask(params={"max_tokens": 3}))
    (output,) = stopped.outputs
    assert (output.text, output.stop_string, output.finish_reason) == ("one two", " th", pb.Output.FINISH_REASON_STOP)
    assert limited.outputs[0].finish_reason == pb.Output.FINISH_REASON_LENGTH
    assert limited.outputs[0].WhichOneof("stop_reason") is None


async def test_tokens_without_text_come_one_by_one(harness):
    engine = harness.Client(replies=("wörld",))
    async with harness.serving(engine) as server:
        chunks = await read(server.stub.Generate(ask(return_text=False, return_token_ids=True)))
    assert [list(chunk.outputs[0].token_ids) for chunk in chunks][:-1] == [[byte] for byte in "wörld".encode()]
    assert not any(chunk.outputs[0].text for chunk in chunks)
    assert engine.seen[0].params.detokenize is False


BAD = [
    ({"params": {"top_p": 3.0}}, "INVALID_ARGUMENT", "top_p"),
    ({"params": {"temperature": float("nan")}}, "INVALID_ARGUMENT", "temperature"),
    ({"params": {"n": 0}}, "INVALID_ARGUMENT", "n"),
    ({"params": {"n": 5000}}, "INVALID_ARGUMENT", "n"),
    ({"params": {"logprobs": -1}}, "INVALID_ARGUMENT", "logprobs"),
    ({"params": {"logprobs": 21}}, "INVALID_ARGUMENT", "logprobs"),
    ({"params": {"prompt_logprobs": 2**31 - 1}}, "INVALID_ARGUMENT", "prompt_logprobs"),
    ({"params": {"max_tokens": 2**63}}, "INVALID_ARGUMENT", "max_tokens"),
    ({"params": {"max_tokens": 512}}, "INVALID_ARGUMENT", "max_tokens"),
    ({"params": {"min_tokens": 100, "max_tokens": 9}}, "INVALID_ARGUMENT", "min_tokens"),
    ({"params": {"stop": [""]}}, "INVALID_ARGUMENT", "stop"),
    ({"params": {"stop_token_ids": [9999]}}, "INVALID_ARGUMENT", "stop_token_ids"),
    ({"params": {"logit_bias": {9999: 1.0}}}, "INVALID_ARGUMENT", "logit_bias"),
    ({"params": {"bad_words": [" "]}}, "INVALID_ARGUMENT", "bad_words"),
    ({"params": {"stop": ["x"]}, "return_text": False}, "INVALID_ARGUMENT", "stop"),
    ({"text": "x" * 600}, "INVALID_ARGUMENT", "prompt"),
    ({"text": "", "add_special_tokens": False}, "INVALID_ARGUMENT", "prompt"),
    ({"token_ids": {}}, "INVALID_ARGUMENT", "prompt"),
    ({"token_ids": {"ids": [2**32 - 1]}}, "INVALID_ARGUMENT", "prompt"),
    ({"text": None}, "INVALID_ARGUMENT", "prompt"),
    ({"chat": {}}, "INVALID_ARGUMENT", "messages"),
    ({"chat": {"messages": [{"role": "robot", "content": "x"}]}}, "INVALID_ARGUMENT", "messages[0].role"),
    ({"chat": {"messages": [{"role": "wizard", "content": "x"}]}}, "INVALID_ARGUMENT", "messages[0].role"),
    (
        {"chat": {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{1}}"}},
        "INVALID_ARGUMENT",
        "chat_template",
    ),
    ({"truncate_prompt_tokens": 0}, "INVALID_ARGUMENT", "truncate_prompt_tokens"),
    ({"priority": -(2**31)}, "INVALID_ARGUMENT", "priority"),
    ({"cache_salt": ""}, "INVALID_ARGUMENT", "cache_salt"),
    ({"request_id": "x" * 300}, "INVALID_ARGUMENT", "request_id"),
    ({"session_id": ""}, "INVALID_ARGUMENT", "session_id"),
    ({"model": "nobody"}, "NOT_FOUND", "model"),
]


async def test_bad_input_is_refused_by_name(harness):
    engine = harness.Client()
    async with harness.serving(engine) as server:
        for fields, code, field in BAD:
            if "chat" not in fields and "token_ids" not in fields:
                fields = {"text": "Hi", **fields}
            for method in (server.stub.GenerateUnary, server.stub.Generate):
                found, details, metadata, messages = await failure(method(pb.GenerationRequest(**fields)), str(fields))
                assert (found.name, metadata.get("octavo-field"), messages) == (code, field, 0), (fields, details)
                assert metadata["x-request-id"]
    assert engine.seen == []


async def test_whatever_a_request_holds_it_is_answered_or_refused(harness):
    rng = random.Random(7)
    good = [
        ask(params=sampling_pb2.SamplingParams(**ALL), cache_salt="x", request_id="r").SerializeToString(),
        pb.GenerationRequest(chat={"messages": [{"role": "user", "content": "hi"}]}).SerializeToString(),
        pb.GenerationRequest(token_ids={"ids": [1, 2, 3]}, params={"logit_bias": {1: 2.0}}).SerializeToString(),
    ]
    engine = harness.Client(replies=("ok",))
    codes = set()
    async with harness.serving(engine) as server:
        generate = server.channel.unary_unary("/octavo.v1.Inference/GenerateUnary")
        for _ in range(300):
            data = bytearray(rng.choice(good))
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                await generate(bytes(data[: rng.randint(0, len(data))] if rng.random() < 0.2 else data))
                codes.add("OK")
            except grpc.aio.AioRpcError as error:
                codes.add(error.code().name)
        assert codes <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
        assert "INVALID_ARGUMENT" in codes
        with pytest.raises(DecodeError):
            pb.GenerationRequest.FromString(b"\xff\xff")
        code, details, _, _ = await failure(generate(b"\xff\xff"))
        assert (code, details) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "The request is no octavo.v1.GenerationRequest.",
        )


@pytest.mark.parametrize(
    ("error", "code", "retry"),
    [
        (CapacityError("full", 7), "RESOURCE_EXHAUSTED", "7"),
        (ReplicaLost("gone"), "UNAVAILABLE", "1"),
        (RankLost("rank 3 died"), "UNAVAILABLE", "1"),
        (StepError("secret"), "INTERNAL", None),
        (ZeroDivisionError("secret"), "INTERNAL", None),
    ],
)
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("through_handle", [False, True])
async def test_errors_have_canonical_codes(harness, error, code, retry, after, through_handle):
    engine = harness.Client(fail_after=(after, error))
    async with harness.serving(engine, through_handle=through_handle) as server:
        found, details, metadata, messages = await failure(server.stub.Generate(ask()))
        assert messages == after + through_handle  # Serve's proxies drop the status of a stream without a message
        assert (found.name, metadata.get("retry-after")) == (code, retry)
        assert metadata.get("grpc-retry-pushback-ms") == (retry and f"{retry}000")
        assert "secret" not in details
        found, details, metadata, _ = await failure(server.stub.GenerateUnary(ask()))
        assert (found.name, metadata.get("retry-after")) == (code, retry)


async def test_keys(harness):
    engine = harness.Client()
    async with harness.serving(engine, api_keys=("secret",)) as server:
        for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "secret"),)):
            for method, request in (
                (server.stub.Generate, ask()),
                (server.stub.GenerateUnary, ask()),
                (server.stub.Tokenize, pb.TokenizeRequest(text="x")),
                (server.stub.ListModels, pb.ListModelsRequest()),
            ):
                code, *_ = await failure(method(request, metadata=metadata))
                assert code == grpc.StatusCode.UNAUTHENTICATED
        assert engine.seen == []
        answer = await server.stub.GenerateUnary(ask(), metadata=(("authorization", "Bearer secret"),))
        assert answer.outputs[0].text


async def test_limits(harness):
    engine = harness.Client(hang_after=1)
    limits = {"max_body_bytes": 100, "max_ongoing_requests": 1, "request_timeout_s": 0.3, "max_choices": 4}
    async with harness.serving(engine, **limits) as server:
        code, *_ = await failure(server.stub.GenerateUnary(ask("x" * 101)))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        code, _, metadata, _ = await failure(server.stub.GenerateUnary(ask(params={"n": 5})))
        assert (code, metadata["octavo-field"]) == (grpc.StatusCode.INVALID_ARGUMENT, "n")
        first = asyncio.create_task(failure(server.stub.Generate(ask())))
        await until(lambda: server.services[0].places.ongoing == 1)
        code, _, metadata, _ = await failure(server.stub.Generate(ask()))
        assert (code, metadata["retry-after"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "1")
        assert (await first)[0] == grpc.StatusCode.DEADLINE_EXCEEDED
        assert server.services[0].places.ongoing == 0
    assert len(engine.aborted) == 1


@pytest.mark.parametrize("how", ["cancel", "deadline"])
@pytest.mark.parametrize("method", ["Generate", "GenerateUnary"])
async def test_a_call_that_is_given_up_is_aborted(harness, how, method, caplog):
    engine = harness.Client(hang_after=2)
    caplog.set_level("INFO", "octavo.access")
    async with harness.serving(engine) as server:
        call = getattr(server.stub, method)(ask(), timeout=0.2 if how == "deadline" else None)
        await until(lambda: engine.live == 1)
        if method == "Generate":
            await call.read()
        if how == "cancel":
            call.cancel()
        await until(lambda: engine.live == 0, 2)
        await until(lambda: "CANCELLED" in caplog.text)
        assert server.services[0].places.ongoing == 0
    assert len(engine.aborted) == 1
    assert "prompt_tokens=" in caplog.text
    assert "outcome=cancelled" in caplog.text
