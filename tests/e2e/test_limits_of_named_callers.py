"""What single callers may take, by the file of callers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.credentials import key_entry, replace
from support.nets import TinyNet
from support.servers import Metrics, script_source

from camserve.client import Client, Credentials, Overloaded, TensorInput

ROW = TensorInput(np.zeros((3, 32, 32), np.float32))


def test_a_named_caller_has_its_own_limits(serve, tmp_path: Path):
    """From one host: one key may ask once, another as often as it likes; a changed file gives the first its allowance."""
    callers = tmp_path / "callers.toml"
    slow, entry = key_entry("slow", ["explain"], requests_per_second="0.001", burst="1")
    free, free_entry = key_entry("free", ["explain"])
    callers.write_text(entry + free_entry, encoding="utf-8")
    server = serve(script_source("tiny", TinyNet(), tmp_path), callers=callers)

    def ask(key: str, retries: int = 0) -> None:
        with Client(server.target, retries=retries, credentials=Credentials(api_key=key)) as client:
            assert client.explain(ROW, model="tiny").prediction

    ask(slow)
    with pytest.raises(Overloaded, match="RATE_LIMITED"):
        ask(slow)
    for _ in range(5):
        ask(free)
    assert 1 == Metrics(server).value("camserve_rejected_total", reason="RATE_LIMITED")
    replace(callers, (entry.replace("0.001", "0") + free_entry).encode())
    server.run(_looked(server)).result()
    for _ in range(5):
        ask(slow)


async def _looked(server) -> None:
    """Reads the file again now, rather than when its change has been heard of."""
    for file in server.app._credentials.files:
        file.look()
