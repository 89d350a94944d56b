"""What a folder should come to, between its policy and what somebody loaded or unloaded by name."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from camserve.server.models.by_hand import ByHand
from camserve.server.models.config import ModelConfig
from camserve.server.models.sources import ModelFolder, ModelSource


def folder(versions: Sequence[str], wanted: Sequence[str]) -> ModelFolder:
    """The model `part`, whose policy asks for some of its versions."""
    sources = {
        version: ModelSource(name="part", version=version, path=None, config=ModelConfig()) for version in versions
    }
    return ModelFolder(name="part", sources=sources, wanted=tuple(sources[version] for version in wanted), labels={})


@pytest.fixture
def by_hand() -> ByHand:
    """Nobody asked for anything by name."""
    return ByHand()


def loads(by_hand: ByHand, of: ModelFolder) -> list[str]:
    """The versions to load."""
    return [source.version for source in by_hand.to_load(of)]


def test_the_policy_decides_where_nobody_did(by_hand):
    """In order of version, as numbers."""
    part = folder(["2", "9", "10"], wanted=["10", "9"])

    assert ["9", "10"] == loads(by_hand, part)
    assert {"9", "10"} == by_hand.may_stay(part, has_all=True)


def test_what_the_policy_drops_stays_until_all_that_it_asks_for_is_there(by_hand):
    """A broken new version does not take the old one with it; what is no longer in the folder goes."""
    part = folder(["1", "2"], wanted=["2"])

    assert {"1", "2"} == by_hand.may_stay(part, has_all=False)
    assert {"2"} == by_hand.may_stay(part, has_all=True)


def test_what_was_loaded_by_name_is_kept_while_it_is_there(by_hand):
    """Beside what the policy asks for, and of this model only."""
    by_hand.keep("part", "1")
    by_hand.keep("board", "2")

    assert ["1", "3"] == loads(by_hand, folder(["1", "2", "3"], wanted=["3"]))
    assert ["3"] == loads(by_hand, folder(["2", "3"], wanted=["3"]))


def test_what_was_unloaded_by_name_stays_away_until_somebody_asks(by_hand):
    """Also when it had been loaded by name before."""
    part = folder(["1", "2", "3"], wanted=["2", "3"])
    by_hand.keep("part", "1")
    by_hand.keep_away("part", ["1", "2"])
    assert ["3"] == loads(by_hand, part)

    by_hand.ask("part", "2")
    assert ["2", "3"] == loads(by_hand, part)


def test_what_is_unloaded_while_others_are_loaded_is_left_out(by_hand):
    """Loading takes a while."""
    coming = by_hand.to_load(folder(["1", "2"], wanted=["1", "2"]))
    assert "1" == next(coming).version
    by_hand.keep_away("part", ["2"])

    assert [] == list(coming)


@pytest.mark.parametrize("ends", ["policy", "gone"])
def test_wishes_end_with_a_call_without_a_version_or_with_the_version(by_hand, ends):
    """Of this model alone."""
    part, board = folder(["1", "2"], wanted=["2"]), folder(["1", "2"], wanted=["2"])
    for name in ("part", "board"):
        by_hand.keep(name, "1")
        by_hand.keep_away(name, ["2"])
    if ends == "policy":
        by_hand.leave_to_policy("board")
        assert ["1"] == loads(by_hand, part)
        by_hand.leave_to_policy("part")
    else:
        for version in ("1", "2"):
            by_hand.forget("part", version)

    assert ["2"] == loads(by_hand, board)
