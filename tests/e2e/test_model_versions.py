"""Models that come and go while a server serves: versions, labels, LoadModel and UnloadModel, as callers see them."""

from __future__ import annotations

import asyncio
import collections
import gc
import itertools
import threading
import weakref

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import gated
from support.folders import ROW, Telling, put_version, write_card
from support.servers import Metrics, script_source

from camserve.client import AsyncClient, Client, FailedPrecondition, NotFound
from camserve.server.models.repository import ModelState
from camserve.server.models.sources import scan_repository

NOT_SERVING, SERVING = health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def start(serve, tmp_path):
    """Starts a server of the repository in `tmp_path`; gives it and a client."""
    clients = []

    def started(**changes):
        server = serve(*scan_repository(tmp_path), repository=tmp_path, **changes)
        clients.append(Client(server.target))
        return server, clients[-1]

    yield started
    for client in clients:
        client.close()


def best(client, version=None) -> int:
    """Which class the answering version puts first."""
    return client.explain(ROW, model="part", specs=["grad-cam"], version=version).prediction.class_index


def states(client) -> dict[str, str]:
    """The state of each version."""
    return {status.version: status.state for status in client.models()}


def health_of(server, name: str) -> int:
    """What the health service says of a model."""
    with grpc.insecure_channel(server.target) as channel:
        request = health_pb2.HealthCheckRequest(service=f"camserve/{name}")
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=60).status


def test_a_new_version_takes_over_when_it_serves(start, tmp_path):
    """LoadModel looks into the folder again; the newest version answers, and the one before leaves by the policy."""
    put_version(tmp_path, "part", 1, best=1)
    server, client = start()
    assert (1, {"1": "ready"}) == (best(client), states(client))

    put_version(tmp_path, "part", 2, best=2)
    card = client.load_model("part")

    assert ("part", "2", 2) == (card.name, card.version, best(client))
    client.unload_model("part", "1")  # Joins the unloading that goes on anyway.
    assert {"1": "unloaded", "2": "ready"} == states(client)
    assert SERVING == health_of(server, "part")
    assert 0 == Metrics(server).value("camserve_model_ready", version="1")


def test_a_version_switches_under_traffic_and_no_request_fails(start, tmp_path):
    """Callers that ask all the time get answers of the old version, then of the new one, and nothing else."""
    put_version(tmp_path, "part", 1, best=1)
    server, _client = start()
    put_version(tmp_path, "part", 2, best=2)

    async def run():
        seen = []
        async with AsyncClient(server.target, retries=0) as asking:
            is_over = asyncio.Event()
            came = collections.defaultdict(asyncio.Event)

            async def ask():
                while not is_over.is_set():
                    result = await asking.explain(ROW, model="part", specs=["grad-cam", "layercam"])
                    assert 2 == len(result.heatmaps)
                    seen.append((result.prediction.class_index, result.summary.version))
                    came[result.summary.version].set()

            callers = [asyncio.create_task(ask()) for _ in range(6)]
            await came["1"].wait()
            await asking.load_model("part")
            await asking.unload_model("part", "1")
            await came["2"].wait()
            is_over.set()
            await asyncio.gather(*callers)
        return seen

    seen = asyncio.run(run())

    assert {(1, "1"), (2, "2")} == set(seen)


def test_a_broken_version_leaves_everything_as_it_was(start, tmp_path):
    """The call, the list and the card of what serves on say why."""
    put_version(tmp_path, "part", 1, best=1)
    server, client = start()
    put_version(tmp_path, "part", 2, best=2).write_bytes(b"this is no archive")

    with pytest.raises(FailedPrecondition, match=r"version 2 could not be loaded.*not a TorchScript archive") as caught:
        client.load_model("part")

    assert "MODEL_LOAD_FAILED" == caught.value.reason
    assert (1, {"1": "ready", "2": "failed"}) == (best(client), states(client))
    (failed,) = [status for status in client.models() if status.version == "2"]
    assert "not a TorchScript archive" in failed.error
    assert any(note.startswith("version 2 could not be loaded") for note in client.model("part").notes)
    assert SERVING == health_of(server, "part")

    put_version(tmp_path, "part", 2, best=2)
    client.load_model("part")

    assert 2 == best(client)
    assert () == tuple(note for note in client.model("part").notes if "could not be loaded" in note)


def test_a_version_is_loaded_anew_when_its_files_have_changed(start, tmp_path):
    """Unchanged files are left alone; broken ones leave what was loaded before; whole ones replace it."""
    path = put_version(tmp_path, "part", 1, best=1)
    server, client = start()
    served = server.app.repository.get("part")
    client.load_model("part", "1")
    assert served is server.app.repository.get("part")

    path.write_bytes(b"half of an archi")
    with pytest.raises(FailedPrecondition, match="what was loaded before serves on"):
        client.load_model("part", "1")
    (status,) = client.models()
    assert (1, "ready") == (best(client), status.state)
    assert "not a TorchScript archive" in status.error
    assert any("its files have changed" in note for note in client.model("part").notes)

    put_version(tmp_path, "part", 1, best=5)
    client.load_model("part", "1")
    (status,) = client.models()
    assert (5, "ready", "") == (best(client), status.state, status.error)


def test_a_card_that_changed_counts_as_changed_files(start, tmp_path):
    """New labels in model.toml reach the card; new versions in it alone load nothing again."""
    put_version(tmp_path, "part", 1, best=1)
    server, client = start()
    before = server.app.repository.get("part")

    write_card(tmp_path, "part", '[versions]\npolicy = "all"')
    client.load_model("part")
    assert before is server.app.repository.get("part")

    card = (tmp_path / "part/model.toml").read_text(encoding="utf-8")
    labels = ", ".join(f'"class {index}"' for index in range(8))
    (tmp_path / "part/model.toml").write_text(f"labels = [{labels}]\n{card}", encoding="utf-8")
    client.load_model("part")
    assert "class 1" == client.explain(ROW, model="part").prediction.label


def test_rules_change_with_the_card(start, tmp_path):
    """Rules of a new card hold from when it is loaded; one that cannot hold leaves those before; none is a change as well."""
    put_version(tmp_path, "part", 1, best=1)
    _server, client = start()

    def told() -> tuple[dict[str, str], list[str]]:
        result = client.explain(ROW, model="part")
        return dict(result.summary.rules), [heatmap.method for heatmap in result.heatmaps]

    assert ({}, []) == told()
    write_card(tmp_path, "part", '[[explain]]\nname = "why"\nmethod = "grad-cam"')
    assert ({}, []) == told()
    client.load_model("part")
    assert ({"why": "applied"}, ["grad-cam"]) == told()

    write_card(tmp_path, "part", '[[explain]]\nname = "why"\nmethod = "layercam"\nlayers = ["nowhere"]')
    with pytest.raises(FailedPrecondition, match=r"rule 'why': layer 'nowhere' .*; what was loaded before serves on"):
        client.load_model("part")
    assert ({"why": "applied"}, ["grad-cam"]) == told()

    write_card(tmp_path, "part", '[[explain]]\nname = "why"\nmethod = "layercam"')
    client.load_model("part")
    assert ({"why": "applied"}, ["layercam"]) == told()
    write_card(tmp_path, "part")
    client.load_model("part")
    assert ({}, []) == told()


def test_labels_name_versions(start, tmp_path):
    """What a label names is served beside the newest; a label can be moved, and one that leads nowhere is told."""
    for version in (1, 2, 3):
        put_version(tmp_path, "part", version, best=version)
    write_card(tmp_path, "part", '[versions]\nlabels = {stable = "1"}')
    _server, client = start()

    assert {"1": "ready", "3": "ready"} == states(client)
    assert (3, 1, 3) == (best(client), best(client, "stable"), best(client, "3"))
    assert {"1": ("stable",), "3": ()} == {status.version: status.version_labels for status in client.models()}
    assert "1" == client.model("part", "stable").version

    write_card(tmp_path, "part", '[versions]\nlabels = {stable = "2"}')
    client.load_model("part")
    assert 2 == best(client, "stable")

    client.unload_model("part", "stable")
    with pytest.raises(NotFound, match="version 2 was unloaded") as caught:
        best(client, "stable")
    assert "MODEL_UNLOADED" == caught.value.reason
    write_card(tmp_path, "part", '[versions]\nlabels = {stable = "7"}')
    with pytest.raises(FailedPrecondition, match="'stable' names version '7', which is not there; there are: 1, 2, 3"):
        client.load_model("part")
    with pytest.raises(NotFound, match="no version 'latest'"):
        best(client, "latest")


def test_a_version_outside_the_policy_is_served_on_demand(start, tmp_path):
    """LoadModel with a version adds it; LoadModel without one goes back to the policy."""
    for version in (1, 2):
        put_version(tmp_path, "part", version, best=version)
    _server, client = start()
    with pytest.raises(NotFound, match="has no version '1'; it has: 2"):
        best(client, "1")

    client.load_model("part", "1")
    assert (1, 2) == (best(client, "1"), best(client))

    client.load_model("part")
    client.unload_model("part", "1")
    assert {"1": "unloaded", "2": "ready"} == states(client)


def test_a_request_inside_is_answered_before_its_model_goes(serve):
    """Unloading refuses newcomers at once, waits for who is inside, and then returns."""
    gated.GATE.reset()
    gated.GATE.opened.set()
    server = serve(gated.gated_source())
    gated.GATE.reset()
    is_unloaded = threading.Event()
    answers = []

    def explain():
        with Client(server.target) as client:
            answers.append(client.explain(ROW, model="gated", specs=["grad-cam"]))

    def unload():
        with Client(server.target) as client:
            client.unload_model("gated")
            is_unloaded.set()

    threads = [threading.Thread(target=explain), threading.Thread(target=unload)]
    threads[0].start()
    assert gated.GATE.reached.wait(120)
    threads[1].start()
    with Client(server.target, retries=0) as client:
        for _ in itertools.count():
            (status,) = client.models()
            if status.state == "unloading":
                break
        with pytest.raises(NotFound, match="was unloaded; LoadModel brings it back"):
            client.explain(ROW, model="gated")
        assert NOT_SERVING == health_of(server, "gated")
        assert not is_unloaded.is_set()

        gated.GATE.opened.set()
        for thread in threads:
            thread.join(180)

        assert is_unloaded.is_set()
        assert 1 == len(answers[0].heatmaps)
        (status,) = client.models()
        assert "unloaded" == status.state
        client.unload_model("gated")  # Once more does nothing.
        client.load_model("gated")  # What was given by a flag comes back as it was given.
        assert 1 == len(client.explain(ROW, model="gated", specs=["grad-cam"]).heatmaps)


@pytest.mark.parametrize("kind", ["script", "factory"])
def test_the_memory_of_an_unloaded_model_is_free(serve, tmp_path, kind):
    """Nothing refers to its weights any more when the call returns, without the collector's regular work."""
    source = script_source("part", Telling(1), tmp_path) if kind == "script" else gated.gated_source()
    gated.GATE.reset()
    gated.GATE.opened.set()
    server = serve(source)
    name = source.name
    with Client(server.target) as client:
        client.explain(ROW, model=name, specs=["grad-cam", "score-cam", "ablation-cam", "guided-backprop"])
        gc.disable()
        try:
            tensors = [weakref.ref(value) for value in server.app.repository.get(name).program.tensors().values()]
            storages = [weakref.ref(value().untyped_storage()) for value in tensors]
            client.unload_model(name)
            assert [None] * len(tensors) == [reference() for reference in tensors]
            assert [None] * len(storages) == [reference() for reference in storages]
        finally:
            gc.enable()
        assert 0 == Metrics(server).value("camserve_pass_seconds_count", model=name)
        assert 0 == Metrics(server).value("camserve_requests_total", model=name)


def test_many_who_ask_for_the_same_version_wait_for_one_load(start, tmp_path):
    """One of them leaves early: the others get their answer all the same."""
    put_version(tmp_path, "part", 1, best=1)
    server, client = start()
    put_version(tmp_path, "part", 2, best=2)

    async def run():
        async with AsyncClient(server.target) as asking:
            calls = [asyncio.create_task(asking.load_model("part", "2")) for _ in range(4)]
            await asyncio.sleep(0)  # No time passes: each begins its call.
            calls[0].cancel()
            return await asyncio.gather(*calls, return_exceptions=True)

    first, *others = asyncio.run(run())

    assert isinstance(first, asyncio.CancelledError)
    assert ["2"] * 3 == [card.version for card in others]
    assert 2 == server.app.repository.get("part").load_number
    assert 2 == best(client)


def test_what_is_not_in_the_repository_is_refused(start, tmp_path):
    """Names never lead out of the folder; the text says what there is."""
    put_version(tmp_path, "part", 1, best=1)
    _server, client = start()

    for name in ("board", "../part", "/etc", ".", "part/1"):
        with pytest.raises(NotFound, match="the repository has no model"):
            client.load_model(name)
    for version in ("2", "../1", ""):
        if version:
            with pytest.raises(NotFound, match=r"has no version .* it has: 1"):
                client.load_model("part", version)
    with pytest.raises(NotFound, match="known models: part"):
        client.unload_model("board")
    with pytest.raises(NotFound, match="has no version '2'"):
        client.unload_model("part", "2")


def test_without_a_repository_nothing_new_can_be_loaded(serve, tmp_path):
    """What was given by flags can be loaded again after it was unloaded; anything else is refused with the reason."""
    server = serve(script_source("part", Telling(3), tmp_path))
    with Client(server.target) as client:
        with pytest.raises(
            FailedPrecondition, match=r"no model repository .* started with: part; start it with"
        ) as caught:
            client.load_model("board")
        assert "REPOSITORY_MISSING" == caught.value.reason
        client.unload_model("part")
        with pytest.raises(NotFound, match="was unloaded"):
            best(client)
        client.load_model("part")
        assert 3 == best(client)


def test_a_model_whose_folder_is_gone_is_forgotten_when_it_goes(start, tmp_path):
    """It is no longer listed, and its health is that of an unknown name."""
    put_version(tmp_path, "part", 1, best=1)
    server, client = start()
    (tmp_path / "part/1/model.pt").unlink()
    (tmp_path / "part/1").rmdir()

    client.unload_model("part")

    assert () == client.models()
    with pytest.raises(grpc.RpcError) as caught:
        health_of(server, "part")
    assert grpc.StatusCode.NOT_FOUND is caught.value.code()


def test_a_model_that_is_new_in_the_repository_is_loaded(start, tmp_path):
    """Also while the server had none of that name before."""
    put_version(tmp_path, "board", 1, best=1)
    server, client = start()
    put_version(tmp_path, "part", 4, best=4)

    client.load_model("part")

    assert 4 == best(client)
    assert SERVING == health_of(server, "part")
    assert ModelState.READY is server.app.repository.slot("part", "4").state
