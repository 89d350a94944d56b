"""A repository that is watched: folders come, change, break and go, and nobody asks for anything."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable

import pytest
from click.testing import CliRunner
from support.folders import ROW, put_version, write_card
from support.servers import until

from camserve.client import Client
from camserve.server.entries.add_command import add
from camserve.server.models.sources import scan_repository


@pytest.fixture
def watched(serve, tmp_path):
    """Starts a server that watches the repository in `tmp_path`; gives a client."""
    clients = []

    def started() -> Client:
        server = serve(*scan_repository(tmp_path), repository=tmp_path, watch_repository=True)
        clients.append(Client(server.target))
        return clients[-1]

    yield started
    for client in clients:
        client.close()


def wait_for(is_so: Callable[[], bool]) -> None:
    """Asks the server until it is so: a folder has no event of its own that a client could await."""
    asyncio.run(until(is_so, timeout_seconds=180))


def states(client: Client) -> dict[str, str]:
    """The state of each version of each model."""
    return {f"{status.name}/{status.version}": status.state for status in client.models()}


def best(client: Client) -> int:
    """Which class the answering version puts first."""
    return client.explain(ROW, model="part").prediction.class_index


def test_versions_come_change_and_go(watched, tmp_path):
    """A new one takes over, one with other files is loaded anew, one that is removed leaves, and so does a whole model."""
    put_version(tmp_path, "part", 1, best=1)
    client = watched()

    put_version(tmp_path, "part", 2, best=2)
    wait_for(lambda: states(client) == {"part/1": "unloaded", "part/2": "ready"})
    assert 2 == best(client)

    put_version(tmp_path, "part", 2, best=5)
    wait_for(lambda: best(client) == 5)

    put_version(tmp_path, "board", 1, best=1)
    wait_for(lambda: states(client).get("board/1") == "ready")

    shutil.rmtree(tmp_path / "part" / "2")
    wait_for(lambda: states(client).get("part/1") == "ready" and "part/2" not in states(client))
    assert 1 == best(client)

    shutil.rmtree(tmp_path / "part")
    wait_for(lambda: states(client) == {"board/1": "ready"})


def test_what_is_broken_or_half_written_disturbs_nothing(watched, tmp_path):
    """A wrong card and a broken archive leave what serves alone; when they are mended, they serve."""
    put_version(tmp_path, "part", 1, best=1)
    client = watched()

    (tmp_path / "part" / "model.toml").write_text("[input", encoding="utf-8")
    put_version(tmp_path, "board", 1, best=1)
    wait_for(lambda: "board/1" in states(client) and states(client)["board/1"] == "ready")
    assert (1, "ready") == (best(client), states(client)["part/1"])

    write_card(tmp_path, "part")
    put_version(tmp_path, "part", 2, best=2).write_bytes(b"half of an archi")
    wait_for(lambda: states(client).get("part/2") == "failed")
    assert (1, "ready") == (best(client), states(client)["part/1"])

    put_version(tmp_path, "part", 2, best=2)
    wait_for(lambda: best(client) == 2)


def test_what_was_unloaded_by_name_stays_so(watched, tmp_path):
    """Until somebody asks for it: a change elsewhere in its folder brings nothing back."""
    for version in (1, 2):
        put_version(tmp_path, "part", version, best=version)
    write_card(tmp_path, "part", '[versions]\npolicy = "all"')
    client = watched()
    client.unload_model("part", "2")

    put_version(tmp_path, "part", 3, best=3)
    wait_for(lambda: states(client).get("part/3") == "ready")
    assert {"part/1": "ready", "part/2": "unloaded", "part/3": "ready"} == states(client)

    client.load_model("part")
    assert {"ready"} == set(states(client).values())


def test_what_a_command_adds_is_served(watched, tmp_path):
    """`camserve models add` puts a version and a whole model beside those that serve, each in one step that is seen whole."""
    put_version(tmp_path, "part", 1, best=1)
    client = watched()
    better = put_version(tmp_path.parent / f"{tmp_path.name}-elsewhere", "part", 1, best=2)

    for name, options in (("part", []), ("board", ["--size", "32"])):
        done = CliRunner().invoke(add, [str(better), "--models", str(tmp_path), "--name", name, *options])
        assert 0 == done.exit_code, done.output

    wait_for(lambda: states(client) == {"board/1": "ready", "part/1": "unloaded", "part/2": "ready"})
    assert 2 == best(client)
