from __future__ import annotations

import pytest

from camserve.server.models.config import VersionsConfig
from camserve.server.models.versions import wanted_versions

PRESENT = ("draft", "2", "9", "10")


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, ("10",)),
        ({"latest": 2}, ("9", "10")),
        ({"latest": 99}, ("draft", "2", "9", "10")),
        ({"policy": "all"}, ("draft", "2", "9", "10")),
        ({"policy": "listed", "listed": ["9", 2]}, ("2", "9")),
        ({"labels": {"stable": 2}}, ("2", "10")),
        ({"labels": {"stable": "10", "next": "10"}}, ("10",)),
        ({"policy": "listed", "listed": ["2"], "labels": {"next": "draft"}}, ("draft", "2")),
    ],
)
def test_the_policy_chooses(config, wanted):
    """Numbers count by value and are newer than names; what a label names serves besides."""
    assert wanted == wanted_versions(PRESENT, VersionsConfig.model_validate(config))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"policy": "listed", "listed": ["3"]}, r"versions\.listed: '3' is not there; there are: draft, 2, 9, 10"),
        ({"labels": {"stable": "3"}}, r"'stable' names version '3', which is not there; there are: draft, 2"),
        ({"labels": {"draft": "2"}}, "'draft' is the name of a version; call the label differently"),
    ],
)
def test_a_version_that_is_not_there_is_told(config, complaint):
    """With those that are."""
    with pytest.raises(ValueError, match=complaint):
        wanted_versions(PRESENT, VersionsConfig.model_validate(config))
