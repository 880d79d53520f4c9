"""A process that plays ingress dies or stops: what it had asked for is aborted in time, and no block is left held."""

import asyncio
import json
import os
import signal
import sys
import time

import pytest
from fakes import fake_replica, request, until

from octavo.cluster import wire
from octavo.cluster.ingress.client import ReplicaLost

pytestmark = pytest.mark.live

INGRESS = """
import asyncio, json
from octavo.cluster.token_receiver import TokenReceiver

async def main():
    receiver = TokenReceiver()
    await receiver.start("127.0.0.1")
    here = receiver.address
    print(json.dumps([here.id, here.address, here.token]), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
STREAMS = 8


@pytest.fixture
async def ingress():
    """(process, address) of an ingress that reads what comes and forgets it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INGRESS, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    address = wire.IngressAddress(*json.loads(await asyncio.wait_for(process.stdout.readline(), 30)))
    yield process, address
    if process.returncode is None:
        process.kill()
    await process.wait()


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
async def test_its_requests_are_aborted_within_five_seconds(ingress, by):
    process, address = ingress
    replica = fake_replica(step_s=0.005, max_num_seqs=STREAMS // 2)  # the other half is queued
    calls = [
        asyncio.create_task(
            replica.generate(wire.encode_submission(wire.Submission(request(max_tokens=2000), address, number)))
        )
        for number in range(STREAMS)
    ]
    await until(lambda: replica._loop.stats().num_running == STREAMS // 2 and replica._loop.num_live == STREAMS)
    os.kill(process.pid, by)
    started = time.monotonic()
    replies = await asyncio.wait_for(asyncio.gather(*calls), 5)
    assert all(isinstance(wire.decode_reply(reply), ReplicaLost) for reply in replies)
    await until(lambda: replica._loop.num_live == 0 and replica._loop.stats().kv_blocks_held == 0)
    assert time.monotonic() - started < (1 if by is signal.SIGKILL else 5)
    print(f"{by.name}: aborted after {time.monotonic() - started:.2f} s")
    replica._loop.core.scheduler.pool.check()
    await replica.close()
