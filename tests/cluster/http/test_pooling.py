"""/v1/embeddings, /score, /rerank, /classify and /pooling, over an engine whose vectors are known beforehand."""

import asyncio
import base64
import dataclasses
import struct
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import httpx
import openai
import pytest

from octavo.cluster.ingress.client import LocalEngineClient, ReplicaLost
from octavo.cluster.ingress.pooling import batch
from octavo.cluster.observability.traces import NO_JOURNEY, Journey
from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.errors import CapacityError, RequestError
from octavo.engine.loop import EngineLoop
from octavo.engine.pooling.info import PoolingInfo
from octavo.engine.pooling.params import PoolingParams
from octavo.engine.text.byte_tokenizer import BOS, ByteTokenizer
from octavo.engine.types import EngineStats, Request, TokenDelta

EMBEDS = PoolingInfo(generates=False, is_causal=False, embedding_size=3, pooling_type="mean", is_matryoshka=True)
CLASSIFIES = PoolingInfo(generates=False, is_causal=False, pooling_type="cls", labels=("bad", "fair", "good"))
SCORES = PoolingInfo(generates=False, is_causal=False, pooling_type="cls", labels=("LABEL_0",), pair_types=2)


def vector_of(prompt: tuple[int, ...], pooling: PoolingParams) -> list[float]:
    """What the scripted engine gives: how many letters a, b and c a text has, halved if it is normalized."""
    letters = [float(sum(token % 261 == letter for token in prompt)) for letter in b"abc"]
    if pooling.task == "classify":
        return letters if pooling.use_activation else [-letter for letter in letters]
    return [x / 2 if pooling.normalize else x for x in letters[: pooling.dimensions]]


@dataclass
class PoolingClient:
    """EngineClient that pools. The request number i takes `waits[i % len]` turns of the event loop."""

    info_value: object
    waits: tuple[int, ...] = (0,)
    fail: dict[int, BaseException | TokenDelta] = field(default_factory=dict)  # by the request's number
    hang: bool = False
    seen: list[Request] = field(default_factory=list)
    live: int = 0
    most: int = 0
    aborted: int = 0

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [prompt for request in self.seen for prompt in request.prompts]

    async def info(self):
        return self.info_value

    async def stats(self):
        return {"replica": EngineStats(first_tokens=1)}

    async def generate(self, request: Request, journey: Journey = NO_JOURNEY) -> AsyncGenerator[TokenDelta, None]:
        number = len(self.seen)
        self.seen.append(request)
        self.live += 1
        self.most = max(self.most, self.live)
        finished = False
        try:
            if self.hang:
                await asyncio.Event().wait()
            for _ in range(self.waits[number % len(self.waits)]):
                await asyncio.sleep(0)
            failure = self.fail.get(number)
            if isinstance(failure, BaseException):
                raise failure
            if failure is not None:
                yield failure
            for index, prompt in reversed(list(enumerate(request.prompts))):
                values = vector_of(prompt, request.pooling)
                if request.pooling.task == "classify" and len(self.info_value.pooling.labels) == 1:
                    values = values[:1]
                finished = index == 0
                vector = struct.pack(f"<{len(values)}f", *values)
                yield TokenDelta(
                    request.request_id, index, (), finish_reason="stop", num_cached_tokens=1, pooled=vector
                )
        finally:
            self.live -= 1
            self.aborted += not finished


@pytest.fixture
def serve(harness):
    """→ (a client of the engine, post(path, **body) → (status, body)) for a model of some kind."""

    def make(pooling: PoolingInfo = EMBEDS, settings: dict | None = None, **options: object):
        engine = PoolingClient(dataclasses.replace(harness.info, pooling=pooling), **options)

        async def post(path: str, **body: object) -> tuple[int, dict]:
            async with harness.http(engine, **(settings or {})) as http:
                answer = await http.post(path, json=body)
                return answer.status_code, answer.json()

        return engine, post

    return make


def vectors(body: dict) -> list[list[float]]:
    assert [entry["index"] for entry in body["data"]] == list(range(len(body["data"])))
    return [entry["embedding"] for entry in body["data"]]


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("ab", [(BOS, *b"ab")]),
        (["ab", "", "c"], [(BOS, *b"ab"), (BOS,), (BOS, *b"c")]),
        ([97, 98], [(97, 98)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
    ],
)
async def test_inputs_of_every_form(serve, given, prompts):
    engine, post = serve()
    status, body = await post("/v1/embeddings", input=given, model="scripted", user="me")
    assert status == 200
    assert engine.prompts == prompts
    assert vectors(body) == [vector_of(prompt, engine.seen[0].pooling) for prompt in prompts]
    tokens = sum(map(len, prompts))
    assert (body["usage"]["prompt_tokens"], body["usage"]["total_tokens"]) == (tokens, tokens)
    assert (body["object"], body["model"], body["data"][0]["object"]) == ("list", "scripted", "embedding")


async def test_base64_holds_the_same_numbers(serve):
    _, post = serve()
    _, plain = await post("/v1/embeddings", input=["aab", "c"])
    _, coded = await post("/v1/embeddings", input=["aab", "c"], encoding_format="base64")
    assert [list(struct.unpack("<3f", base64.b64decode(each))) for each in vectors(coded)] == vectors(plain)


async def test_what_a_request_asks_for_reaches_the_engine(serve):
    engine, post = serve()
    fields = {"priority": 3, "cache_salt": "salt", "session_id": "s", "dimensions": 2, "normalize": False}
    status, body = await post("/v1/embeddings", input="aab", **fields)
    assert (status, vectors(body)) == (200, [[2.0, 1.0]])
    (request,) = engine.seen
    assert (request.priority, request.cache_salt, request.session_id) == (3, "salt", "s")
    status, body = await post("/v1/embeddings", input="aab", use_activation=False)
    assert vectors(body) == [[2.0, 1.0, 0.0]]


async def test_longer_inputs_are_refused_or_cut(serve):
    engine, post = serve()
    status, body = await post("/v1/embeddings", input=["a", "b" * 512])
    assert (status, body["error"]["param"]) == (400, "input[1]")
    assert "513 tokens" in body["error"]["message"]
    for fields, kept in (
        ({"truncate_prompt_tokens": -1}, (BOS, *b"a" * 300, *b"b" * 211)),
        ({"truncate_prompt_tokens": 4}, (BOS, *b"aaa")),
        ({"truncate_prompt_tokens": 4, "truncation_side": "left"}, (BOS, *b"bbb")),
    ):
        status, _ = await post("/v1/embeddings", input="a" * 300 + "b" * 300, **fields)
        assert (status, engine.prompts[-1]) == (200, kept)
    await post("/v1/embeddings", input=[97, 98, 99], truncate_prompt_tokens=2)
    assert engine.prompts[-1] == (97, 98)
    status, body = await post("/v1/embeddings", input="a", truncate_prompt_tokens=513)
    assert (status, body["error"]["param"]) == (400, "truncate_prompt_tokens")


async def test_a_conversation_is_one_input(serve):
    engine, post = serve()
    status, body = await post("/v1/embeddings", messages=[{"role": "user", "content": "abc"}])
    assert (status, len(body["data"])) == (200, 1)
    text = ByteTokenizer().decode(engine.seen[0].prompt_token_ids, skip_special_tokens=False)
    assert text == "<|bos|><|start|>user\nabc<|end|>\n"


async def test_the_model_s_own_prompts_go_before_texts(serve):
    info = dataclasses.replace(EMBEDS, prompts=(("query", "q: "), ("doc", "")), default_prompt="query")
    engine, post = serve(info)
    for fields in ({}, {"prompt_name": "doc"}):
        assert (await post("/v1/embeddings", input=["a", "b"], **fields))[0] == 200
    texts = [ByteTokenizer().decode(prompt) for prompt in engine.prompts]
    assert texts == ["q: a", "q: b", "a", "b"]
    status, body = await post("/v1/embeddings", input="a", prompt_name="nobody's")
    assert (status, body["error"]["param"]) == (400, "prompt_name")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {}, "input"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": ["a", 5]}, "input"),
        ("/v1/embeddings", {"input": [[1], []]}, "input[1]"),
        ("/v1/embeddings", {"input": [[1], [261]]}, "input[1]"),
        ("/v1/embeddings", {"input": [-1]}, "input"),
        ("/v1/embeddings", {"input": "a", "messages": [{"role": "user", "content": "b"}]}, "input"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "dimensions": 4}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
        ("/v1/embeddings", {"input": ["a"] * 9}, "input"),
        ("/v1/embeddings", {"input": "a", "cache_salt": ""}, "cache_salt"),
        ("/v1/embeddings", {"input": "a", "model": "another"}, "model"),
        ("/classify", {"input": "a"}, "model"),
        ("/pooling", {"input": "a", "task": "token_embed"}, "task"),
        ("/score", {"text_1": "a"}, "text_2"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/v1/completions", {"prompt": "a"}, "model"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "model"),
        ("/v1/responses", {"input": "a"}, "model"),
    ],
)
async def test_what_is_wrong_is_named(serve, path, body, param):
    engine, post = serve(settings={"max_choices": 8})
    status, answer = await post(path, **body)
    assert status == (404 if body.get("model") == "another" else 400)
    assert answer["error"]["param"] == param
    assert engine.seen == []


async def test_many_inputs_run_side_by_side_and_keep_their_order(serve, monkeypatch):
    monkeypatch.setattr(batch, "SIDE_BY_SIDE", 5)
    engine, post = serve(waits=(7, 0, 3, 1, 5))
    texts = ["a" * (i % 9) + "b" * (i % 4) for i in range(300)]
    status, body = await post("/v1/embeddings", input=texts)
    assert status == 200
    assert vectors(body) == [[text.count("a") / 2, text.count("b") / 2, 0.0] for text in texts]
    assert (engine.most, engine.live, engine.aborted) == (5, 0, 0)
    assert [len(request.prompts) for request in engine.seen] == [32] * 9 + [12]


@pytest.mark.parametrize(
    ("failure", "status", "words"),
    [
        (RequestError("The prompt is odd.", "prompt"), 400, "input[96] … input[127]: The prompt is odd."),
        (ReplicaLost("gone"), 503, "gone"),
        (TokenDelta("r", 0, (), finish_reason="error", error="secret"), 500, "Internal error"),
        (TokenDelta("r", 0, (), finish_reason="abort"), 503, "ended the request early"),
    ],
)
async def test_one_failure_ends_all(serve, failure, status, words):
    engine, post = serve(fail={3: failure}, waits=(20, 20, 20, 1, 20))
    found, body = await post("/v1/embeddings", input=["a"] * 250)
    assert found == status
    assert words in body["error"]["message"]
    assert "secret" not in str(body)
    assert engine.live == 0
    assert engine.aborted >= 5


async def test_a_batch_waits_for_room_that_it_takes_itself(serve):
    """Every other call is refused while one of the batch is under way; with nothing under way, that is a 429."""
    full = CapacityError("full", 3)
    engine, post = serve(fail=dict.fromkeys(range(1, 40, 2), full), waits=(9, 1))
    status, body = await post("/v1/embeddings", input=["a"] * 32 * 20)
    assert (status, len(body["data"])) == (200, 640)
    assert len(engine.seen) > 20
    engine, post = serve(fail=dict.fromkeys(range(99), full))
    assert (await post("/v1/embeddings", input=["a"] * 640))[0] == 429


async def test_a_client_that_leaves_ends_its_batch(serve, harness):
    engine, _ = serve(hang=True)
    with harness.server(engine) as url:
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.post(f"{url}/v1/embeddings", json={"input": ["a"] * 90}, timeout=0.5)
        await harness.eventually(lambda: engine.aborted == 3)


async def test_scores_are_cosines_of_embeddings(serve):
    _, post = serve()
    status, body = await post("/score", text_1="ab", text_2=["ab", "a", "c"])
    assert (status, body["data"][0]["object"]) == (200, "score")
    assert [entry["score"] for entry in body["data"]] == pytest.approx([1, 0.5**0.5, 0])
    for names in (("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
        _, body = await post("/v1/score", **dict(zip(names, (["a", "b"], ["ab", "c"]), strict=True)))
        assert [entry["score"] for entry in body["data"]] == pytest.approx([0.5**0.5, 0])


async def test_a_cross_encoder_reads_pairs(serve):
    """Here the tokens of the second text are marked, and the score is how many a the pair has."""
    engine, post = serve(SCORES)
    _, body = await post("/score", text_1="ab", text_2=["a", "aaa"], use_activation=True)
    assert [entry["score"] for entry in body["data"]] == [2, 4]
    assert engine.seen[0].prompt_token_ids == (BOS, *b"ab", *b"a")
    assert body["usage"]["prompt_tokens"] == 4 + 6
    status, body = await post("/v1/embeddings", input="a")
    assert (status, body["error"]["param"]) == (400, "model")


async def test_a_model_of_several_classes_scores_nothing(serve):
    _, post = serve(CLASSIFIES)
    status, body = await post("/score", text_1="a", text_2="b")
    assert (status, body["error"]["param"]) == (400, "model")


async def test_rankings(serve):
    _, post = serve()
    documents = ["c", {"text": "ab"}, "a", "ab"]
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        status, body = await post(path, query="ab", documents=documents, top_n=3)
        assert status == 200
        assert [(each["index"], each["document"]["text"]) for each in body["results"]] == [
            (1, "ab"),
            (3, "ab"),
            (2, "a"),
        ]
        assert [each["relevance_score"] for each in body["results"]] == pytest.approx([1, 1, 0.5**0.5])
        assert body["usage"]["total_tokens"] == 3 + 2 + 3 + 2 + 3
    _, body = await post("/rerank", query="ab", documents=documents, return_documents=False, top_n=99)
    assert [sorted(each) for each in body["results"]] == [["index", "relevance_score"]] * 4


async def test_classes(serve):
    _, post = serve(CLASSIFIES)
    status, body = await post("/classify", input=["abb", "ccc"])
    assert status == 200
    assert [(entry["label"], entry["num_classes"]) for entry in body["data"]] == [("fair", 3), ("good", 3)]
    assert body["data"][0]["probs"] == [1, 2, 0]
    _, body = await post("/classify", input="abb", use_activation=False)
    assert body["data"][0]["probs"] == [-1, -2, 0]


async def test_pooling_is_whatever_the_model_makes(serve):
    _, post = serve(CLASSIFIES)
    _, body = await post("/pooling", input="aab")
    assert body["data"] == [{"index": 0, "object": "pooling", "data": [2, 1, 0]}]
    _, post = serve()
    _, body = await post("/pooling", input="aab", task="embed", encoding_format="base64")
    assert struct.unpack("<3f", base64.b64decode(body["data"][0]["data"])) == (1, 0.5, 0)


async def test_requests_are_counted(harness, serve):
    engine, _ = serve()
    async with harness.http(engine) as http:
        await http.post("/v1/embeddings", json={"input": ["a", "b"]})
        text = (await http.get("/metrics")).text
        assert (await http.get("/ready")).status_code == 200
    counted = {line.split("{")[0]: line.split()[-1] for line in text.splitlines() if 'reason="stop"' in line}
    assert counted["octavo:request_success_total"] == "2.0"


async def test_the_official_client_and_a_whole_engine(harness):
    """The client asks for base64 by itself, and gives floats. A model that generates embeds too."""
    core = build_engine(EngineConfig(model="fake", max_num_seqs=8))
    loops = []

    def start(on_deltas):
        loops.append(EngineLoop(core.core, on_deltas))
        loops[0].start()
        return loops[0]

    try:
        with harness.server(LocalEngineClient(core.info, start), served_model_names=("fake",)) as url:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as api:
                texts = [f"text {i} " * (i % 7) for i in range(200)]
                many = await api.embeddings.create(model="fake", input=texts)
                plain = await api.embeddings.create(model="fake", input=texts, encoding_format="float")
                talk = await api.completions.create(model="fake", prompt="Hello", max_tokens=5)
                assert [each.embedding for each in many.data] == [each.embedding for each in plain.data]
                assert len({tuple(each.embedding) for each in many.data}) == len(set(texts))
                assert many.usage.prompt_tokens == sum(len(text) + 1 for text in texts)
                assert talk.choices[0].text
                with pytest.raises(openai.BadRequestError) as caught:
                    await api.embeddings.create(model="fake", input="a", dimensions=4)
                assert caught.value.param == "dimensions"
        assert core.core.scheduler.pool.num_held == 0
    finally:
        loops[0].stop()
