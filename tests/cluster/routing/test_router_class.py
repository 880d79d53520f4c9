"""The router as Serve makes it: a copy of its class, by value, in each process that has a handle."""

import subprocess
import sys

from ray.serve.config import RequestRouterConfig

from octavo.cluster.app import ROUTER

CHECK = """
import sys
from ray import cloudpickle
from octavo.cluster.routing.call import Call
copy = cloudpickle.loads(sys.stdin.buffer.read())
known = copy.choose_replicas.__globals__["_call_of"].__globals__["Call"]
assert known is Call, "the router would not know a call's argument for what it is"
"""


def test_it_knows_calls_in_another_process_too():
    pickled = RequestRouterConfig(request_router_class=ROUTER).get_serialized_request_router_cls()
    assert pickled is not None
    subprocess.run([sys.executable, "-c", CHECK], input=pickled, check=True)
