"""LocalEngineClient and its mailbox, with the fake engine on its real thread; and clients that leave or read slowly."""

import asyncio
import contextlib
import json
import socket
import time
from dataclasses import replace

import httpx
import pytest

from octavo.cluster.ingress.client import LocalEngineClient, Mailbox, merge
from octavo.cluster.observability.metrics import INGRESS
from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.errors import CapacityError, RequestError
from octavo.engine.loop import EngineLoop
from octavo.engine.params import SamplingParams
from octavo.engine.types import Request, TokenDelta

HI = {"messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


@contextlib.contextmanager
def fake_engine(model="fake", **config):
    engine = build_engine(EngineConfig(model=model, **config))
    loops = []

    def start(on_deltas):
        loops.append(EngineLoop(engine.core, on_deltas))
        loops[0].start()
        return loops[0]

    try:
        yield LocalEngineClient(engine.info, start)
    finally:
        loops[0].stop()


def request(name="r", **params):
    params = SamplingParams(**{"seed": 1, "ignore_eos": True, "max_tokens": 20, **params})
    return Request(name, (1, 2, 3), params, arrival_time=time.monotonic())


async def tokens_of(client, request):
    tokens = {}
    async for delta in client.generate(request):
        assert delta.request_id == request.request_id
        tokens.setdefault(delta.index, []).extend(delta.token_ids)
    return tokens


async def idle(client):
    for _ in range(400):
        (stats,) = (await client.stats()).values()
        if stats.num_running == stats.num_waiting == stats.kv_blocks_held == 0:
            return stats
        await asyncio.sleep(0.005)
    raise AssertionError(f"the engine is still at work: {stats}")


async def test_all_tokens_of_all_sequences():
    with fake_engine() as client:
        assert (await client.info()).model == "fake"
        alone = await tokens_of(client, request())
        several = await tokens_of(client, request("s", n=3))
        at_once = await asyncio.gather(*(tokens_of(client, request(f"r{i}")) for i in range(10)))
    assert len(alone[0]) == 20
    assert {index: len(tokens) for index, tokens in several.items()} == {0: 20, 1: 20, 2: 20}
    assert all(tokens == alone for tokens in at_once)


async def test_leaving_aborts():
    with fake_engine() as client:
        async with contextlib.aclosing(client.generate(request(max_tokens=4000))) as deltas:
            async for _ in deltas:
                break
        task = asyncio.create_task(tokens_of(client, request("t", max_tokens=4000)))
        await asyncio.sleep(0.05)
        task.cancel()
        stats = await idle(client)
    assert stats.generation_tokens < 2000


async def test_refusals_come_before_the_first_delta():
    with fake_engine(max_num_seqs=1, max_num_queued_reqs=1) as client:
        with pytest.raises(RequestError):
            await tokens_of(client, Request("long", (1,) * 5000, SamplingParams(seed=1)))
        running = [asyncio.create_task(tokens_of(client, request(f"r{i}", max_tokens=4000))) for i in range(1)]
        await asyncio.sleep(0.1)
        running.append(asyncio.create_task(tokens_of(client, request("r1", max_tokens=4000))))
        await asyncio.sleep(0.1)
        with pytest.raises(CapacityError):
            await tokens_of(client, request("r2"))
        with pytest.raises(RequestError, match="running already"):
            await tokens_of(client, request("r0"))
        assert not any(task.done() for task in running), "the refused must not disturb the others"
        for task in running:
            task.cancel()
        await idle(client)


async def test_the_mailbox_merges_what_piles_up():
    box = Mailbox()
    for token in range(5):
        box.put(TokenDelta("r", 0, (token,), num_cached_tokens=2 if token == 0 else 0))
        box.put(TokenDelta("r", 1, (10 + token,)))
    box.put(TokenDelta("r", 0, (5,), finish_reason="length"))
    first, second = await box.take(), await box.take()
    assert (first.index, first.token_ids, first.finish_reason, first.num_cached_tokens) == (
        0,
        (*range(6),),
        "length",
        2,
    )
    assert (second.index, second.token_ids, second.finish_reason) == (1, (*range(10, 15),), None)
    waiting = asyncio.create_task(box.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    box.put(TokenDelta("r", 1, (15,)))
    box.fail(CapacityError("Full."))
    assert (await waiting).token_ids == (15,)
    with pytest.raises(CapacityError):
        await box.take()


def test_merging_keeps_how_it_ended():
    last = TokenDelta("r", 0, (3,), finish_reason="stop", form_complete=True, pooled=b"x", error="e", error_param="p")
    assert merge([TokenDelta("r", 0, (1,)), TokenDelta("r", 0, (2,)), last]) == replace(last, token_ids=(1, 2, 3))


def test_merging_one_changes_nothing():
    delta = TokenDelta("r", 0, (1,))
    assert merge([delta]) is delta


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hang_after", [0, 3])
async def test_a_client_that_leaves_aborts_its_request(harness, stream, hang_after):
    """Also while nothing is sent: waiting in the queue, or computing a long prompt."""
    client = harness.Client(hang_after=hang_after)
    with harness.server(client) as url:
        address = httpx.URL(url)
        body = json.dumps({**HI, "stream": stream, "n": 2}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection((address.host, address.port)) as connection:
            connection.sendall(head + body)
            await harness.eventually(lambda: client.live == 1)
            await asyncio.sleep(0.05)
            assert client.aborted == []
        left = time.monotonic()
        await harness.eventually(lambda: client.live == 0)
        assert time.monotonic() - left < 0.5
        assert client.aborted == [client.seen[0].request_id]
        async with httpx.AsyncClient(base_url=url) as http:
            client.hang_after = None
            assert (await http.post(PATH, json=HI)).status_code == 200
            metrics = (await http.get("/metrics")).text
    if hang_after:
        assert (
            f'octavo:request_success_total{{finished_reason="abort",ingress="{INGRESS}",model_name="scripted"}} 1.0'
            in metrics
        )


async def test_leaving_frees_every_prompt_of_a_request(harness):
    client = harness.Client(hang_after=1)
    with harness.server(client) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            body = {"prompt": ["a", "b", "c", "d"], "stream": True}
            async with http.stream("POST", "/v1/completions", json=body) as response:
                await anext(response.aiter_lines())
                assert client.live == 4
        await harness.eventually(lambda: client.live == 0)
    assert len(client.aborted) == 4


async def test_a_stop_string_frees_the_engine(harness):
    with fake_engine() as client:
        async with harness.http(client, served_model_names=("fake",)) as http:
            reply = await http.post(PATH, json={**HI, "max_tokens": 3000, "stop": ["e", " "], "n": 2, "seed": 5})
            stats = await idle(client)
    assert [choice["finish_reason"] for choice in reply.json()["choices"]] == ["stop", "stop"]
    assert not any(stop in choice["message"]["content"] for choice in reply.json()["choices"] for stop in "e ")
    assert stats.generation_tokens < 1000


async def test_a_slow_reader_costs_no_events_and_slows_nobody(harness):
    """The socket's buffers fill; what then comes is merged, and all of it arrives once the client reads."""
    long = {**HI, "max_tokens": 1000, "ignore_eos": True, "seed": 3, "logprobs": True, "top_logprobs": 1}
    body = json.dumps({**long, "stream": True}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with (
        fake_engine() as client,
        harness.server(client, send_buffer=4096, served_model_names=("fake",)) as url,
        socket.socket() as slow,
    ):
        address = httpx.URL(url)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((address.host, address.port))
        slow.sendall(head + body)
        async with httpx.AsyncClient(base_url=url, timeout=20) as http:
            started = time.monotonic()
            quick = await http.post(PATH, json={**HI, "max_tokens": 50, "ignore_eos": True})
            assert quick.json()["usage"]["completion_tokens"] == 50
            assert time.monotonic() - started < 3
            whole = (await http.post(PATH, json=long)).json()["choices"][0]
        await idle(client)  # the engine is done with it although nobody has read
        slow.settimeout(10)
        received = b""
        while part := await asyncio.to_thread(slow.recv, 1 << 16):
            received += part
    assert b"[DONE]" in received
    events = [json.loads(line[6:])["choices"][0] for line in received.split(b"\n") if line.startswith(b"data: {")]
    texts = [event["delta"].get("content") or "" for event in events]
    assert "".join(texts) == whole["message"]["content"]
    entries = [entry for event in events if event["logprobs"] for entry in event["logprobs"]["content"]]
    assert entries == whole["logprobs"]["content"]
    assert max(map(len, texts)) > 50, "what piles up must merge"


def open_stream(url, body, receive_buffer=4096):
    """A socket on which the answer to `body` arrives, and nobody reads."""
    address = httpx.URL(url)
    data = json.dumps(body).encode()
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    reader.connect((address.host, address.port))
    reader.sendall(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
    return reader


async def seconds_of(url, body):
    """How long a stream takes whose client reads."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        started = time.monotonic()
        async with http.stream("POST", PATH, json={**body, "stream": True}) as response:
            assert "[DONE]" in (await response.aread()).decode()
        return time.monotonic() - started


async def test_readers_that_crawl_slow_nobody_and_take_no_more_than_their_tokens(harness):
    long = {**HI, "max_tokens": 900, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 5}
    quick = {**HI, "max_tokens": 100, "ignore_eos": True}
    with fake_engine(model="fake:step_ms=1") as client, contextlib.ExitStack() as stack:
        url = stack.enter_context(harness.server(client, send_buffer=4096, served_model_names=("fake",)))
        alone = min([await seconds_of(url, quick) for _ in range(2)])
        readers = [stack.enter_context(open_stream(url, {**long, "seed": i})) for i in range(8)]
        crawling = asyncio.create_task(crawl(readers[0]))
        await harness.eventually(lambda: len(client._mailboxes) == 8)
        beside = min([await seconds_of(url, quick) for _ in range(2)])
        assert beside < 3 * alone + 0.1, (alone, beside)
        await idle(client)  # no block is held for those who do not read
        waiting = [sum(map(len, box._pending.values())) for box in client._mailboxes.values()]
        assert len(waiting) == 8
        assert 0 < max(waiting) <= 900
        assert min([await seconds_of(url, quick) for _ in range(2)]) < 2 * alone + 0.1
        crawling.cancel()
        for reader in readers:
            reader.close()
        await harness.eventually(lambda: not client._mailboxes)


async def crawl(reader):
    """A byte every tenth of a second."""
    while True:
        await asyncio.to_thread(reader.recv, 1)
        await asyncio.sleep(0.1)


async def test_a_reader_that_never_comes_back_is_cut_off(harness, monkeypatch, caplog):
    monkeypatch.setattr("octavo.cluster.ingress.answers.STALL_S", 0.3)
    long = {**HI, "max_tokens": 1500, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 5}
    with fake_engine(model="fake:step_ms=0.2") as client, contextlib.ExitStack() as stack:
        url = stack.enter_context(
            harness.server(
                client, send_buffer=4096, early_errors_s=0.1, served_model_names=("fake",), max_ongoing_requests=1
            )
        )
        stack.enter_context(open_stream(url, long))
        await harness.eventually(lambda: len(client._mailboxes) == 1)
        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            assert (await http.post(PATH, json=HI)).status_code == 429
            await harness.eventually(lambda: not client._mailboxes, 5)
            await idle(client)
            assert (await http.post(PATH, json=HI)).status_code == 200, "its place is free"
    assert not [record for record in caplog.records if record.exc_info]
