"""What models may take of a device's memory, and who goes where there is no room."""

from __future__ import annotations

import pytest
import torch
from support.folders import ROW, put_version
from support.servers import script_source

from camserve.client import Client, Overloaded
from camserve.server.models.loader import load_model
from camserve.server.models.sources import scan_repository


@pytest.fixture
def start(serve, tmp_path):
    """Starts a server of three models, of which two fit; gives a client."""
    for number, name in enumerate(("one", "two")):
        put_version(tmp_path, name, 1, best=number)
    (source, _) = scan_repository(tmp_path)
    size = load_model(source, device=torch.device("cpu"), max_batch_rows=2).card.memory_bytes
    clients = []

    def started(**changes):
        sources = list(scan_repository(tmp_path))
        put_version(tmp_path, "three", 1, best=3)
        server = serve(*sources, repository=tmp_path, max_model_bytes=2 * size, **changes)
        clients.append(Client(server.target))
        return clients[-1]

    yield started
    for client in clients:
        client.close()


def states(client) -> dict[str, str]:
    """The state of each model."""
    return {status.name: status.state for status in client.models()}


def test_a_card_tells_what_its_model_takes(serve, tmp_path):
    """Every parameter and buffer counts once."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), _Mean(), torch.nn.Linear(8, 4))
    with Client(serve(script_source("part", module, tmp_path)).target) as client:
        assert 4 * (3 * 8 * 9 + 8 + 8 * 4 + 4) == client.model("part").memory_bytes


class _Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b c h w) to (b c)."""
        return x.mean((2, 3))


def test_a_model_beyond_the_limit_is_refused(start):
    """At once told who holds what; when one was unloaded there is room."""
    client = start()

    with pytest.raises(Overloaded, match=r"of which are held: one 1 .*, two 1 .*; unload one") as caught:
        client.load_model("three")
    assert "MODEL_MEMORY_EXHAUSTED" == caught.value.reason
    assert {"one": "ready", "two": "ready", "three": "failed"} == states(client)

    client.unload_model("one")
    client.load_model("three")
    assert {"one": "unloaded", "two": "ready", "three": "ready"} == states(client)


def test_the_model_not_used_for_longest_goes_where_that_is_allowed(start):
    """Whoever was asked last stays."""
    client = start(unload_idle_models=True)
    client.explain(ROW, model="two")
    client.explain(ROW, model="one")

    client.load_model("three")
    client.unload_model("two")  # Joins the unloading that goes on.

    assert {"one": "ready", "two": "unloaded", "three": "ready"} == states(client)
