"""The services that Serve's gRPC servers serve: for `grpc_servicer_functions`. Serve's proxies import this: it has no
more than they need.
"""

from __future__ import annotations

from typing import Any

import grpc

from octavo.cluster.ingress.grpc.proxy import leaving_noticed
from octavo.protos.octavo.v1 import inference_pb2

# For Serve's gRPCOptions. Every node must be able to import them.
SERVICER_FUNCTIONS = (
    "octavo.cluster.ingress.grpc.register.add_inference",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)


def add_inference(servicer: Any, server: Any) -> None:
    """Like the generated function, but requests stay bytes until they are where they are answered.

    One that cannot be parsed is thus refused like any other, and a proxy that hands requests on does neither parse them
    nor pickle messages.
    """
    service = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
    handlers = {}
    for method in service.methods:
        kind = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        handlers[method.name] = kind(getattr(servicer, method.name))
    with leaving_noticed(server):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
        server.add_registered_method_handlers(service.full_name, handlers)
