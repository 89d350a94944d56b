"""What is compiled for a model, where it is kept, and what the card says when it cannot be."""

from __future__ import annotations

import asyncio
import dataclasses
import os

import pytest
import torch
from support.nets import FailsOnBrightRows, TinyNet
from support.servers import script_source

from camserve.server.models.compiling import batch_sizes, compile_plan, package_name
from camserve.server.models.config import InputConfig, ModelConfig, OutputConfig, PlanConfig
from camserve.server.models.loader import load_model


@pytest.fixture
def source(tmp_path):
    """A tiny net that asks to be compiled."""
    return script_source("tiny", TinyNet(), tmp_path, plan=PlanConfig(compile=True))


@pytest.fixture
def served(source):
    """That net, loaded."""
    return load_model(source, device=torch.device("cpu"), max_batch_rows=6)


async def at_once(work):
    """Stands for the device thread where nothing else wants it."""
    return work()


@pytest.mark.parametrize(
    ("changes", "asked", "expected"),
    [
        ({"max_batch_rows": 8}, (), (8, 1, 4, 2)),
        ({"max_batch_rows": 6}, (), (6, 1, 4, 2)),
        ({"max_batch_rows": 1}, (), (1,)),
        ({"max_batch_rows": 8}, (4, 1), (4, 1)),
        ({"max_batch_rows": 8}, (16, 2), (8, 2)),
        ({"static_batch_rows": 4}, (1, 2), (4,)),
    ],
)
def test_rows_of_packages(served, changes, asked, expected):
    """The largest first, then one row; a model that takes one number of rows gets no other."""
    assert expected == batch_sizes(dataclasses.replace(served.card, **changes), asked)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_sha256": "0"},
        {"dtype": "bfloat16"},
        {"default_layer": "stem"},
        {"max_batch_rows": 2},
    ],
)
def test_another_computation_is_another_package(served, source, changes):
    """Weights, dtype and layer are in a package's name; what it does not depend on is not."""
    other = package_name(dataclasses.replace(served.card, **changes), source, 4)
    assert (other == package_name(served.card, source, 4)) is ("max_batch_rows" in changes)
    assert package_name(served.card, source, 4) != package_name(served.card, source, 2)


def test_a_model_that_cannot_be_compiled_says_so(tmp_path):
    """A model of several sizes asks in vain: its card tells why, and no plan is there to ride."""
    source = script_source(
        "several", TinyNet(), tmp_path, input=InputConfig(size=(32, 32), variable=True), plan=PlanConfig(compile=True)
    )
    served = load_model(source, device=torch.device("cpu"), max_batch_rows=2)
    assert served.pass_model.compiled is None
    assert any(note.startswith("not compiled: it takes inputs of several sizes") for note in served.card.notes)


def test_a_model_that_does_not_ask_is_not_compiled(tmp_path):
    """Compiling is opt-in."""
    served = load_model(script_source("plain", TinyNet(), tmp_path), device=torch.device("cpu"), max_batch_rows=2)
    assert served.pass_model.compiled is None
    assert not any("compiled" in note for note in served.card.notes)


async def test_a_cache_that_others_can_write_to_is_refused(served, source, tmp_path):
    """Packages are run as code: a folder that is open to everybody is not read."""
    cache = tmp_path / "plans"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(ValueError, match="can be written by others"):
        await compile_plan(source, served, cache=cache, on_device=at_once)


async def test_without_a_compiler_the_card_says_what_to_install(served, source, tmp_path, monkeypatch):
    """The ordinary plan goes on serving, and the note names the compiler."""
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    note = await compile_plan(source, served, cache=None, on_device=at_once)
    assert "not compiled for rows 1, 2, 4, 6, the ordinary plan serves: there is no C++ compiler; install g++" in note
    assert not served.pass_model.compiled.live


@pytest.mark.needs_compiler
async def test_a_model_that_looks_at_its_values_is_not_compiled(tmp_path):
    """A branch on the input cannot be traced, and nothing that was taken at load is baked in."""
    source = script_source("bright", FailsOnBrightRows(), tmp_path, plan=PlanConfig(compile=True))
    served = load_model(source, device=torch.device("cpu"), max_batch_rows=2)
    note = await compile_plan(source, served, cache=None, on_device=at_once)
    assert "not compiled for rows 1, 2, the ordinary plan serves: its operators could not be traced" in note
    assert not served.pass_model.compiled.live


async def test_a_server_that_stops_ends_the_compiling(served, source, tmp_path, monkeypatch):
    """Cancelled, it ends the process with the compiler that this one started, and leaves no half of a package."""
    pipe, compiler, cache = tmp_path / "pipe", tmp_path / "compiler", tmp_path / "plans"
    os.mkfifo(pipe)
    # Holds the pipe open for as long as it lives.
    compiler.write_text(f"#!/bin/sh\nexec 3>{pipe}\necho started >&3\nexec tail -f /dev/null\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))

    compiling = asyncio.create_task(compile_plan(source, served, cache=cache, on_device=at_once))
    with await asyncio.to_thread(pipe.open) as reader:
        assert "started\n" == await asyncio.to_thread(reader.readline)
        compiling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await compiling
        assert not await asyncio.to_thread(reader.read)  # Ends when nobody holds it open any more.
    assert not list(cache.iterdir())


def test_labels_of_an_order_travel(tmp_path):
    """The written part of a card reads back from what the other process is sent."""
    config = ModelConfig(labels=("a", "b"), output=OutputConfig(path="out"), plan=PlanConfig(batch_sizes=(2,)))
    assert config == ModelConfig.model_validate_json(config.model_dump_json())
