"""The server that all comparisons share, and the table they fill."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from contract.conformance import table
from contract.conformance.served import Served, sources
from support.servers import settings

from camserve.client import Client
from camserve.server.background import BackgroundServer

_MEASURED: dict[str, list[table.Measured]] = {}


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for the session: loading networks takes longer than asking them."""
    models = sources(tmp_path_factory.mktemp("conformance"))
    with BackgroundServer(settings(), models) as server, Client(server.target) as client:
        yield Served(client=client)


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest) -> Iterator[list[table.Measured]]:
    """What the module's comparisons found; written under `build/` when they are done."""
    found = _MEASURED.setdefault(request.module.__name__.rpartition(".")[2], [])
    yield found
    if found:
        table.write(request.module.__name__.rpartition(".")[2], found)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows how near every method came, and to whom."""
    for name, found in _MEASURED.items():
        if found:
            terminalreporter.section(f"{name}: largest differences")
            for one in table.largest(found):
                terminalreporter.write_line(
                    f"{one.library:10} {one.method:30} {one.difference:8.1e} of {one.limit:.0e}  {one.network}"
                )
