"""Serve takes all that a stream yields, read or not: a window holds it up, and tokens merge behind it."""

import asyncio

from fakes import INFO, fake_loop, until

from octavo.cluster.ingress.catalog import Catalog
from octavo.cluster.ingress.client import LocalEngineClient
from octavo.cluster.ingress.grpc.servicer import Servicer
from octavo.cluster.ingress.grpc.window import UNSENT, Window
from octavo.cluster.ingress.service import Service
from octavo.cluster.ingress.settings import IngressSettings
from octavo.engine.text.byte_tokenizer import ByteTokenizer
from octavo.protos.octavo.v1 import inference_pb2 as pb


class Context:
    def invocation_metadata(self):
        return [("x-request-id", "r")]

    def peer(self):
        return "ipv4:127.0.0.1:1"

    def set_trailing_metadata(self, metadata):
        pass


async def test_a_reader_that_stops_costs_a_window_and_gets_the_rest_merged():
    loops = []

    def start(on_deltas):
        loops.append(fake_loop(on_deltas))
        loops[0].start()
        return loops[0]

    client = LocalEngineClient(INFO, start)
    service = Service(IngressSettings(served_model_names=("fake",)), client, ByteTokenizer())
    servicer = Servicer(Catalog([service]))
    params = {"max_tokens": 1000, "temperature": 0, "ignore_eos": True}

    async def taken(queue):
        """Serve's part: everything goes into the queue as it comes."""
        request = pb.GenerationRequest(text="Hi", params=params).SerializeToString()
        async for parcel in servicer.generate(request, Context()):
            queue.append(parcel)

    try:
        read, unread = [], []
        slow = asyncio.create_task(taken(unread))
        await until(lambda: loops[0].stats().generation_tokens == 1000, 20)  # nobody's reading is waited for
        assert len(unread) == UNSENT
        assert not slow.done()
        while not slow.done():
            while unread:
                read.append(pb.GenerationChunk.FromString(unread.pop(0).SerializeToString()))
            await asyncio.sleep(0.001)
        await slow
        read += [pb.GenerationChunk.FromString(parcel.SerializeToString()) for parcel in unread]
        whole = await servicer.generate_unary(
            pb.GenerationRequest(text="Hi", params=params).SerializeToString(), Context()
        )
        assert "".join(chunk.outputs[0].text for chunk in read) == whole.outputs[0].text
        assert read[-1].usage.completion_tokens == 1000
        assert len(read) <= UNSENT + 2
    finally:
        loops[0].stop()


async def test_window():
    window = Window(2)
    parcels = [window.parcel(pb.GenerationChunk()) for _ in range(2)]
    waiting = asyncio.create_task(window.room())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await asyncio.to_thread(parcels[0].SerializeToString)
    await asyncio.wait_for(waiting, 1)
    assert window.unsent == 1
    await asyncio.wait_for(window.room(), 1)
