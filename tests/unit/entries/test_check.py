"""`camserve models check` on real folders; the command is run as the group of the client runs it, without a server."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from support.nets import TinyNet

from camserve.client import Client
from camserve.server.entries.check_command import check
from camserve.server.models.sources import scan_repository

# What differs from load to load: times, and what was chosen by time.
TIMED = ("warm_up_seconds", "plan")


def put(root: Path, name: str, archive: bytes | None = None, *, version: str = "1", toml: str = "") -> None:
    """Puts a model's folder into a repository: TinyNet, or a file of these bytes."""
    folder = root / name / version
    folder.mkdir(parents=True)
    if toml:
        (root / name / "model.toml").write_text(toml, encoding="utf-8")
    if archive is None:
        torch.jit.save(torch.jit.script(TinyNet().eval()), str(folder / "model.pt"))
    else:
        (folder / "model.pt").write_bytes(archive)


TINY = "[input]\nsize = [32, 32]\n"


def run(*arguments: str | Path) -> Result:
    """Runs the command."""
    return CliRunner().invoke(check, [*map(str, arguments)])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A repository of which one model can be served, and what the command says of it."""
    root: Path = tmp_path_factory.mktemp("mixed")
    put(root, "broken", b"no archive")
    put(root, "misdescribed", toml="[input]\nsiez = [32, 32]\n")
    put(root, "tiny", version="3", toml=TINY)
    (root / "empty").mkdir()
    return root, run(root, "--json", "--max-batch-rows", "4")


def accounts(result: Result) -> dict[str, dict[str, Any]]:
    """What it printed, by name."""
    return {account["name"]: account for account in json.loads(result.stdout)}


def test_a_model_that_fails_leaves_the_others_alone(mixed: tuple[Path, Result]) -> None:
    """Each failure has its reason; the exit status tells that there was one."""
    _, result = mixed

    told = accounts(result)
    assert 1 == result.exit_code
    assert ["broken", "empty", "misdescribed", "tiny"] == list(told)
    assert [False, False, False, True] == [account["works"] for account in told.values()]
    assert "this is not a TorchScript archive" in told["broken"]["error"]
    assert "holds no version" in told["empty"]["error"]
    assert "input.siez: Extra inputs are not permitted" in told["misdescribed"]["error"]
    assert (None, []) == (told["broken"]["card"], told["broken"]["passes"])


def test_progress_is_told_on_standard_error(mixed: tuple[Path, Result]) -> None:
    """A line before each load, and one that sums up."""
    _, result = mixed

    assert [
        "(1 of 4) loading broken 1 …",
        "(2 of 4) loading empty …",
        "(3 of 4) loading misdescribed …",
        "(4 of 4) loading tiny 3 …",
        "1 of 4 can be served, not: broken 1, empty, misdescribed",
    ] == result.stderr.splitlines()


def test_the_card_is_that_of_a_server(mixed: tuple[Path, Result], tmp_path: Path, serve: Any) -> None:
    """Served with the same limit, the model has the same card; only what is timed may differ."""
    root, result = mixed
    put(tmp_path, "tiny", version="3", toml=TINY)
    server = serve(*scan_repository(tmp_path), max_batch_rows=4)

    with Client(server.target) as client:
        served = json.loads(json.dumps(dataclasses.asdict(client.model("tiny"))))
    checked = accounts(result)["tiny"]["card"]
    assert (root / "tiny/3/model.pt").read_bytes()
    assert {key: value for key, value in served.items() if key not in TIMED} == {
        key: value for key, value in checked.items() if key not in TIMED
    }


def test_passes_are_timed_at_both_ends(mixed: tuple[Path, Result]) -> None:
    """Predictions alone and explained, for one row and for as many as the settings allow."""
    _, result = mixed

    passes = accounts(result)["tiny"]["passes"]
    assert [(1, ""), (1, "grad-cam"), (4, ""), (4, "grad-cam")] == [(p["rows"], p["method"]) for p in passes]
    assert all(p["seconds"] > 0 and p["peak_bytes"] >= 0 for p in passes)


def test_every_version_that_would_serve_is_checked(tmp_path: Path) -> None:
    """As the model's policy says; one of them may fail and another work."""
    put(tmp_path, "tiny", toml=TINY + '[versions]\npolicy = "listed"\nlisted = [1, 3]\n')
    for version, archive in (("2", b"not asked for"), ("3", b"broken")):
        put(tmp_path, "tiny", archive, version=version)

    result = run(tmp_path, "--json", "--max-batch-rows", "2")

    assert 1 == result.exit_code
    assert [("1", True), ("3", False)] == [(told["version"], told["works"]) for told in json.loads(result.stdout)]
    assert "1 of 2 can be served, not: tiny 3" in result.stderr


class Strange:
    """What a pickle can do: call anything when it is read."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        """As pickle wants it."""
        return Path.touch, (self._trace,)


def test_weights_that_would_run_code_are_refused_and_do_not(tmp_path: Path) -> None:
    """A state dict of a factory in a repository is read as tensors or not at all, also beside tensors that fit."""
    folder = tmp_path / "models/net/1"
    folder.mkdir(parents=True)
    (folder.parent / "model.toml").write_text('[factory]\nname = "torchvision:squeezenet1_1"\n', encoding="utf-8")
    torch.save({"features.0.weight": torch.zeros(1), "more": Strange(tmp_path / "trace")}, folder / "weights.pth")

    result = run(tmp_path / "models", "--json")

    assert 1 == result.exit_code
    assert "cannot read weights from" in accounts(result)["net"]["error"]
    assert not (tmp_path / "trace").exists()


def test_people_are_shown_tables(mixed: tuple[Path, Result]) -> None:
    """The card as `camserve models NAME` shows it, and what one pass takes."""
    root, _ = mixed

    result = run(root, "--name", "tiny", "--device", "cpu")

    assert 0 == result.exit_code, result.output
    for told in (
        "tiny, version 3",
        "model sha256",
        "(default)",
        "grad-cam",
        "legrad",
        "One pass",
        "memory at its height",
    ):
        assert told in result.stdout
    assert ["(1 of 1) loading tiny 3 …", "1 of 1 can be served"] == result.stderr.splitlines()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("{root}", "--name", "tniy"), "holds no model 'tniy'; it has: broken, empty, misdescribed, tiny"),
        (("{root}/tiny",), "is the folder of one model; name the repository: camserve models check {root} --name tiny"),
        (("{root}/empty",), "holds no models: expected {root}/empty/<name>/model.toml"),
        (("{root}", "--device", "gpu"), "'gpu' is not a device; write auto, cpu, cuda or cuda:0"),
        (("{root}", "--max-batch-rows", "0"), "max_batch_rows"),
    ],
)
def test_what_cannot_be_checked_is_told(mixed: tuple[Path, Result], arguments: tuple[str, ...], told: str) -> None:
    """One complaint that says what to write instead; nothing is loaded."""
    root, _ = mixed

    result = run(*(argument.format(root=root) for argument in arguments))

    assert 1 == result.exit_code
    assert result.stderr.startswith("Error: ")
    assert told.format(root=root) in result.stderr
    assert "pydantic.dev" not in result.stderr


def test_help_shows_examples() -> None:
    """Nobody should have to guess the first call."""
    assert "Examples:\n    camserve models check" in run("--help").output
