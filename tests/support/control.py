"""A bare grpc.aio server that streams back given messages: the control that tells gRPC's own cost and memory from camserve's.

`python -m support.control FILE SECONDS` parses requests as camserve does and answers each with the messages in FILE, which
`tests/support/processes.py` took from a real answer, after a pause of so many seconds before each, in which callers may leave.
Nothing else: no interceptor, no log, no metrics.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from camserve.v1 import explanation_service_pb2, explanation_service_pb2_grpc


class Echo(explanation_service_pb2_grpc.ExplanationServiceServicer):
    """Answers everybody alike."""

    def __init__(self, messages: list[explanation_service_pb2.ExplainResponse], pause_seconds: float) -> None:
        self._messages = messages
        self._pause_seconds = pause_seconds

    async def Explain(  # noqa: N802 - the name is the contract's
        self, request: explanation_service_pb2.ExplainRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[explanation_service_pb2.ExplainResponse]:
        """Streams the messages."""
        for message in self._messages:
            if self._pause_seconds:
                await asyncio.sleep(self._pause_seconds)
            yield message


async def serve(messages: list[explanation_service_pb2.ExplainResponse], pause_seconds: float) -> None:
    """Serves until the process is ended, and says on which port."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)])
    explanation_service_pb2_grpc.add_ExplanationServiceServicer_to_server(Echo(messages, pause_seconds), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"ready on port {port} with the messages", file=sys.stderr, flush=True)  # noqa: T201 - read by who started us
    await server.wait_for_termination()


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="ascii").split()
    answer = [explanation_service_pb2.ExplainResponse.FromString(bytes.fromhex(line)) for line in lines]
    asyncio.run(serve(answer, float(sys.argv[2])))
