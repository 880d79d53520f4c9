"""What goes over the wire comes back as it was; the generated modules are those of the .proto files."""

import dataclasses
import math
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.cluster import wire
from octavo.cluster.ingress.client import HandedOver, ReplicaLost
from octavo.engine.beam import Beams
from octavo.engine.errors import CapacityError, NotFoundError, RequestError
from octavo.engine.params import SamplingParams
from octavo.engine.pooling.info import PoolingInfo
from octavo.engine.pooling.params import PoolingParams
from octavo.engine.types import (
    EngineInfo,
    EngineStats,
    GenerationDefaults,
    PhaseTimes,
    Request,
    Resumed,
    TokenDelta,
    TokenLogprobs,
)
from octavo.protos import generate
from octavo.protos.octavo.v1 import sampling_pb2, tokens_pb2

words = st.text(string.ascii_letters + "äß中🙂 ", min_size=1, max_size=8).filter(str.strip)
tokens = st.lists(st.integers(0, 300_000), max_size=5).map(tuple)
counts = st.integers(0, 2**31)
floats = st.floats(allow_nan=False)

params = st.builds(
    SamplingParams,
    n=st.integers(1, 5),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.1, 5),
    temperature=st.floats(0.01, 5),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 1000),
    min_p=st.floats(0, 1),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(words, max_size=3).map(tuple),
    stop_token_ids=tokens,
    ignore_eos=st.booleans(),
    max_tokens=st.none() | st.integers(20, 10_000),
    min_tokens=st.integers(0, 20),
    logprobs=st.none() | st.integers(-1, 20),
    prompt_logprobs=st.none() | st.integers(-1, 20),
    skip_special_tokens=st.booleans(),
    spaces_between_special_tokens=st.booleans(),
    include_stop_str_in_output=st.booleans(),
    logit_bias=st.dictionaries(st.integers(0, 300_000), st.floats(-100, 100), max_size=3),
    allowed_token_ids=tokens,
    bad_words=st.lists(words, max_size=2).map(tuple),
    skip_reading_prefix_cache=st.none() | st.booleans(),
) | st.builds(
    SamplingParams,
    n=st.integers(1, 3),
    beams=st.builds(Beams, st.integers(3, 9), st.floats(-5, 5), st.sampled_from([True, False, "never"])),
)
params |= st.builds(SamplingParams, logprobs=st.integers(0, 5), logprob_token_ids=tokens)
requests = st.builds(
    Request,
    request_id=words,
    prompt_token_ids=tokens,
    params=params,
    priority=st.integers(-100, 100),
    cache_salt=st.none() | words,
    arrival_time=st.just(7.0),
    bad_words_token_ids=st.lists(tokens, max_size=3).map(tuple),
    resume=st.lists(st.builds(Resumed, st.integers(0, 4), tokens), max_size=3).map(tuple),
    pooling=st.none()
    | st.builds(
        PoolingParams,
        task=st.sampled_from(["embed", "classify"]),
        pooling_type=st.sampled_from([None, "last", "mean", "cls"]),
        normalize=st.none() | st.booleans(),
        dimensions=st.none() | st.integers(1, 10_000),
        use_activation=st.none() | st.booleans(),
        skip_reading_prefix_cache=st.none() | st.booleans(),
    ),
    more_prompts=st.lists(tokens, max_size=3).map(tuple),
)
logprobs = st.builds(
    TokenLogprobs,
    token_ids=st.lists(st.integers(0, 300_000), min_size=1, max_size=4).map(tuple),
    logprobs=st.lists(floats, min_size=1, max_size=4).map(tuple),
    rank=st.integers(1, 300_000),
)
deltas = st.builds(
    TokenDelta,
    request_id=words,
    index=st.integers(0, 1000),
    token_ids=tokens,
    logprobs=st.lists(logprobs, max_size=3).map(tuple),
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    stop_reason=st.none() | st.integers(0, 300_000) | words,
    num_cached_tokens=counts,
    prompt_logprobs=st.none() | st.lists(st.none() | logprobs, max_size=3).map(tuple),
    error=st.none() | words,
    pooled=st.none() | st.binary(max_size=16),
)


def through(message):
    """As bytes and back."""
    return type(message).FromString(message.SerializeToString())


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(0, 2**64 - 1))
def test_submission_round_trip(request, stream_id):
    sent = wire.Submission(request, wire.IngressAddress("i-1", "127.0.0.1:1234", "secret"), stream_id)
    assert wire.decode_submission(wire.encode_submission(sent), 7.0) == sent


@settings(max_examples=150, deadline=None)
@given(deltas, st.integers(0, 2**64 - 1))
def test_delta_round_trip(delta, stream_id):
    proto = through(wire.delta_to_proto(delta, stream_id))
    assert proto.stream_id == stream_id
    assert wire.delta_from_proto(proto, delta.request_id) == delta


def test_times_survive():
    delta = TokenDelta("r", 0, (1,), times=PhaseTimes(0.0, 1.5))
    assert wire.delta_from_proto(through(wire.delta_to_proto(delta, 1)), "r").times == delta.times


def test_infinite_logprobs_survive():
    delta = TokenDelta("r", 0, (1,), (TokenLogprobs((1, 2), (-0.1, -math.inf), 1),))
    assert wire.delta_from_proto(through(wire.delta_to_proto(delta, 1)), "r") == delta


def test_greedy_params_round_trip():
    for given_params in (SamplingParams(temperature=0), SamplingParams(), SamplingParams(max_tokens=None)):
        assert wire.params_from_proto(through(wire.params_to_proto(given_params))) == given_params


def test_every_sampling_field_is_on_the_wire():
    on_the_wire = {field.name for field in sampling_pb2.SamplingParams.DESCRIPTOR.fields}
    assert on_the_wire == {field.name for field in dataclasses.fields(SamplingParams)}
    assert wire.params_to_proto(SamplingParams()).ByteSize() == 0  # absent = default


def test_params_out_of_range_name_the_field():
    with pytest.raises(RequestError) as caught:
        wire.params_from_proto(sampling_pb2.SamplingParams(top_p=7))
    assert caught.value.param == "top_p"


def test_stats_and_info_round_trip():
    names = [field.name for field in dataclasses.fields(EngineStats)]
    stats = EngineStats(**{name: number for number, name in enumerate(names, 1)})
    assert wire.stats_from_proto(through(wire.stats_to_proto(stats))) == stats
    info = EngineInfo("m", 4096, 258, (256, 257), "float32", "cpu", 16, 99, GenerationDefaults(0.0, 0.9, top_k=5))
    info = dataclasses.replace(info, phases=(("weights", 1.5), ("kv", 0.25)), quantization="int8", batch_invariant=True)
    info = dataclasses.replace(info, kv_block_bytes=4096, weights_bytes=2**34, steps_bytes=2**30)
    assert wire.info_from_proto(through(wire.info_to_proto(info))) == info
    pooling = PoolingInfo(
        generates=False,
        is_causal=False,
        embedding_size=384,
        pooling_type="mean",
        normalize=False,
        is_matryoshka=True,
        dimensions=(64, 128),
        labels=("no", "yes"),
        pair_types=2,
        prompts=(("query", "search: "),),
        default_prompt="query",
    )
    info = dataclasses.replace(info, pooling=pooling)
    assert wire.info_from_proto(through(wire.info_to_proto(info))) == info


@pytest.mark.parametrize(
    "error",
    [RequestError("no", "top_p"), RequestError("no"), NotFoundError("no such", "model"), CapacityError("full", 3)],
)
def test_errors_stay_typed(error):
    back = wire.decode_reply(wire.encode_reply(error))
    assert type(back) is type(error)
    assert vars(back) == vars(error)


@pytest.mark.parametrize("error", [ReplicaLost("gone"), HandedOver("has to stop")])
def test_lost_and_handed_over(error):
    back = wire.decode_reply(wire.encode_reply(error))
    assert type(back) is type(error)
    assert str(back) == str(error)


def test_reply_without_error():
    assert wire.decode_reply(wire.encode_reply(None)) is None


def test_generated_modules_are_current(tmp_path: Path):
    pytest.importorskip("grpc_tools")
    written = generate.generate(tmp_path)
    assert {"tokens_pb2.py", "tokens_pb2.pyi", "tokens_pb2_grpc.py", "sampling_pb2.py"} <= {
        path.name for path in written
    }
    for path in written:
        assert (tmp_path / path).read_text() == (generate.ROOT / path).read_text(), (
            f"{path}: run octavo.protos.generate"
        )


def test_delta_proto_has_no_request_id():
    assert "request_id" not in {field.name for field in tokens_pb2.TokenDelta.DESCRIPTOR.fields}
