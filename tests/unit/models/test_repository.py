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


def test_an_unloaded_version_says_so_and_names_those_that_answer():
    """From the moment at which it takes no more requests; a request without a version goes to another one."""
    repository = Repository([source("part", "1"), source("part", "2")])
    one, two = ready(repository, "part", "1"), ready(repository, "part", "2")

    assert two is repository.set_leaving("part", "2")
    assert one is repository.get("part")
    with pytest.raises(
        NotFound, match=r"version 2 was unloaded; LoadModel brings it back; versions that answer: 1"
    ) as caught:
        repository.get("part", "2")
    assert Reason.MODEL_UNLOADED is caught.value.reason
    assert ModelState.UNLOADING is repository.slot("part", "2").state

    repository.set_unloaded("part", "2")
    assert ModelState.UNLOADED is repository.slot("part", "2").state
    repository.set_leaving("part", "1")
    with pytest.raises(NotFound, match=r"version 2 was unloaded; LoadModel brings it back$"):
        repository.get("part")


def test_what_answers_goes_on_while_it_is_loaded_anew_and_if_that_fails():
    """The error is kept for the list and the card until a load succeeds."""
    repository = Repository([source("part")])
    old = ready(repository, "part")

    repository.set_loading(source("part"))
    assert (old, ModelState.READY) == (repository.get("part"), repository.slots()[0].state)
    repository.set_failed(source("part"), "the file is corrupt")
    assert (old, ModelState.READY) == (repository.get("part"), repository.slots()[0].state)
    assert [
        "its files have changed and could not be loaded: the file is corrupt; what was loaded before serves on"
    ] == (repository.troubles(old.card))

    new = ready(repository, "part")
    assert new is repository.get("part")
    assert [] == repository.troubles(new.card)


def test_the_card_of_one_version_tells_of_another_that_failed():
    """Whoever looks at what serves learns why nothing newer does."""
    repository = Repository([source("part", "1"), source("part", "2")])
    one = ready(repository, "part", "1")
    repository.set_failed(source("part", "2"), "no memory")

    assert ["version 2 could not be loaded: no memory"] == repository.troubles(one.card)


def test_a_label_stands_for_a_version():
    """Labels are looked up at each request; one whose version is not there names both."""
    repository = Repository([source("part", "1"), source("part", "2")])
    one = ready(repository, "part", "1")
    repository.set_labels("part", {"stable": "1", "next": "3"})

    assert one is repository.get("part", "stable")
    assert (["stable"], []) == (repository.labels_of("part", "1"), repository.labels_of("part", "2"))
    with pytest.raises(NotFound, match="has no version '3', which the label 'next' names; it has: 1, 2"):
        repository.get("part", "next")


def test_a_forgotten_model_was_never_there():
    """With its last version its labels go."""
    repository = Repository([source("part")])
    repository.set_labels("part", {"stable": "1"})

    repository.forget("part", "1")

    assert ([], {}) == (repository.slots(), dict(repository.labels("part")))


def test_a_card_is_changed_only_of_the_load_that_it_is_about():
    """What compiling found out of a version that has been loaded anew since concerns nobody any more."""
    repository = Repository([source("part")])
    old = ready(repository, "part")
    new = dataclasses.replace(old, load_number=2)
    repository.set_ready(new)

    repository.set_card(old, dataclasses.replace(old.card, notes=("compiled",)))
    assert () == repository.get("part").card.notes
    repository.set_card(new, dataclasses.replace(new.card, notes=("compiled",)))
    assert ("compiled",) == repository.get("part").card.notes
