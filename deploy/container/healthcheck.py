"""Asks the server in this container how it is: exit status 0 when it is well, 1 with a line on standard error otherwise.

Docker's HEALTHCHECK runs it without an argument: is the process alive, as `/livez` says on the port of CAMSERVE_METRICS_LISTEN?
An argument names a service of grpc.health.v1 on the port of CAMSERVE_LISTEN, such as `camserve/surface` for one model; an empty
one means the whole server: is it ready? That is also asked where there is no page. A server that knows its callers tells about
models to who has the key in CAMSERVE_API_KEY; one with TLS is asked by its page, which knows of the whole server only.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

_DEFAULT_LISTEN = "127.0.0.1:50051"
_DEFAULT_METRICS_LISTEN = "0.0.0.0:8002"
_TIMEOUT_SECONDS = 3.0


def target(listen: str) -> str:
    """Where to ask: the port that is listened on, by loopback when that means every address."""
    host, _, port = listen.rpartition(":")
    return f"{'127.0.0.1' if host in {'', '0.0.0.0', '[::]'} else host}:{port}"  # noqa: S104 - compared, not bound


def well(address: str, page: str) -> str:
    """Returns nothing, or what `/livez` or `/readyz` complains of."""
    # A proxy of the environment is not between us and ourselves.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}{page}", timeout=_TIMEOUT_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read().decode(errors='replace').strip()}"
    except OSError as error:
        return f"no answer: {getattr(error, 'reason', error)}"


def ready(address: str, service: str) -> str:
    """Returns nothing if it is SERVING, or what it is instead."""
    import grpc  # noqa: PLC0415 - slow to import, and every ten seconds it is not needed
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        key = [("x-api-key", os.environ["CAMSERVE_API_KEY"])] if os.environ.get("CAMSERVE_API_KEY") else []
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_TIMEOUT_SECONDS, metadata=key)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    status = str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return "" if status == "SERVING" else status


def main() -> int:
    """Checks once."""
    page = os.environ.get("CAMSERVE_METRICS_LISTEN", _DEFAULT_METRICS_LISTEN)
    named = sys.argv[1] if len(sys.argv) > 1 else None
    if page and (named is None or (named == "" and os.environ.get("CAMSERVE_TLS_CERTIFICATE"))):
        address = target(page)
        complaint = well(address, "/livez" if named is None else "/readyz")
    else:
        address = target(os.environ.get("CAMSERVE_LISTEN") or _DEFAULT_LISTEN)
        complaint = ready(address, named or "")
    if not complaint:
        return 0
    print(f"{address}: {complaint}", file=sys.stderr)  # noqa: T201 - Docker shows it
    return 1


if __name__ == "__main__":
    sys.exit(main())
