"""Asks the server in this container how it is: exit status 0 when it serves, 1 with a line on standard error otherwise.

Docker's HEALTHCHECK runs it; it also suits an exec probe. It speaks grpc.health.v1 to the port that the server was told by
CAMSERVE_LISTEN. An argument names one service, such as `camserve/surface` for one model; none means the whole server.
"""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_DEFAULT_LISTEN = "0.0.0.0:50051"
_TIMEOUT_SECONDS = 3.0


def target(listen: str) -> str:
    """Where to ask: the port that is listened on, by loopback when that means every address."""
    host, _, port = listen.rpartition(":")
    return f"{'127.0.0.1' if host in {'', '0.0.0.0', '[::]'} else host}:{port}"  # noqa: S104 - compared, not bound


def check(address: str, service: str) -> str:
    """Returns "SERVING", another status of the protocol, or why there is none."""
    # A proxy of the environment is not between us and ourselves.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def main() -> int:
    """Checks once."""
    address = target(os.environ.get("CAMSERVE_LISTEN") or _DEFAULT_LISTEN)
    status = check(address, sys.argv[1] if len(sys.argv) > 1 else "")
    if status == "SERVING":
        return 0
    print(f"{address}: {status}", file=sys.stderr)  # noqa: T201 - Docker shows it
    return 1


if __name__ == "__main__":
    sys.exit(main())
