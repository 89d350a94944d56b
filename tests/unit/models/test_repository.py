from __future__ import annotations

import dataclasses

import pytest
from support.cards import card

from camserve.server.errors import NotFound, Reason, Unavailable
from camserve.server.models.config import ModelConfig
from camserve.server.models.repository import ModelState, Repository, ServedModel
from camserve.server.models.sources import ModelSource


def source(name: str, version: str = "1") -> ModelSource:
    """A model to be loaded."""
    return ModelSource(name=name, version=version, path=None, config=ModelConfig())


def ready(repository: Repository, name: str, version: str = "1") -> ServedModel:
    """Says that a model has been loaded."""
    served = ServedModel(card=dataclasses.replace(card(), name=name, version=version), pass_model=None)
    repository.set_ready(served)
    return served


def test_a_ready_model_is_found():
    """By name alone, and by name and version."""
    repository = Repository([source("part"), source("board")])
    part = ready(repository, "part")

    assert part is repository.get("part")
    assert part is repository.get("part", "1")


def test_no_version_takes_the_newest_that_is_ready():
    """Versions count as numbers, and one that is still loading does not take the model away."""
    repository = Repository([source("part", version) for version in ("9", "10", "2", "11")])
    ready(repository, "part", "9")
    ten = ready(repository, "part", "10")

    assert ten is repository.get("part")


def test_slots_are_listed_by_name_and_version():
    """The newest version last."""
    repository = Repository([source("part", "10"), source("part", "9"), source("board")])

    assert [("board", "1"), ("part", "9"), ("part", "10")] == [(s.name, s.version) for s in repository.slots()]


def test_an_unknown_model_is_told_what_there_is():
    """With the nearest name where there is one."""
    repository = Repository([source("surface"), source("board")])

    with pytest.raises(NotFound, match=r"did you mean 'surface'.* board, surface") as caught:
        repository.get("surfaces")

    assert (Reason.MODEL_NOT_FOUND, "model") == (caught.value.reason, caught.value.field)


def test_a_huge_name_is_refused_at_once():
    """Looking for near names does not grow with what was sent."""
    with pytest.raises(NotFound):
        Repository([source("surface")]).get("s" * 5_000_000)


def test_a_server_without_models_says_so():
    """Nothing to list."""
    with pytest.raises(NotFound, match="known models: none"):
        Repository([]).get("surface")


def test_an_unknown_version_is_told_what_there_is():
    """All versions of that model."""
    repository = Repository([source("part", "1"), source("part", "2")])

    with pytest.raises(NotFound, match="has no version '3'; it has: 1, 2") as caught:
        repository.get("part", "3")

    assert (Reason.VERSION_NOT_FOUND, "version") == (caught.value.reason, caught.value.field)


def test_a_loading_model_is_worth_coming_back_for():
    """A time to retry comes with the refusal."""
    with pytest.raises(Unavailable, match="is still loading") as caught:
        Repository([source("part")]).get("part")

    assert (Reason.MODEL_NOT_READY, 1.0) == (caught.value.reason, caught.value.retry_after_seconds)


def test_a_failed_model_is_not_worth_coming_back_for():
    """The reason of the failure is told; retrying would not help."""
    repository = Repository([source("part")])
    repository.set_failed(source("part"), "the file is corrupt")

    with pytest.raises(Unavailable, match="failed to load: the file is corrupt") as caught:
        repository.get("part")

    assert ModelState.FAILED is repository.slots()[0].state
    assert caught.value.retry_after_seconds is None


def test_two_models_of_one_name_are_refused():
    """One of them would silently not be served."""
    with pytest.raises(ValueError, match="'part' version 1 is given twice"):
        Repository([source("part"), source("part")])
