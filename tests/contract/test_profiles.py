"""Profiles through a real server: who has a method, and who has not. Whose values they give stands in `conformance/`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from contract.conformance.served import transformer_source
from support.nets import TinyNet
from support.servers import script_source, settings

from camserve.client import Client, InvalidRequest, Spec
from camserve.server.background import BackgroundServer
from camserve.server.cam.methods import METHODS, Family
from camserve.server.jobs import Profile

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[Client]:
    """A client of a server with TinyNet, and a transformer for methods that read attention."""
    tiny = script_source("tiny", TinyNet(), tmp_path_factory.mktemp("models"))
    with BackgroundServer(settings(), [tiny, transformer_source()]) as server, Client(server.target) as client:
        yield client


def model_for(method: str) -> str:
    """The model that the method can explain."""
    return "transformer" if METHODS[method].family is Family.ATTENTION else "tiny"


@pytest.mark.parametrize("method", METHODS)
def test_every_profile_that_has_the_method_gives_a_map(client, method):
    """And the map says whose conventions were followed."""
    profiles = [profile for profile in Profile if profile not in METHODS[method].absent_from]
    specs = [Spec(method, profile=profile, encoding="float32") for profile in profiles]

    answer = client.explain(IMAGE, model=model_for(method), specs=specs)

    assert dict(enumerate(profiles)) == {heatmap.spec_index: heatmap.profile for heatmap in answer.heatmaps}


@pytest.mark.parametrize(
    ("method", "profile"),
    [(method.slug, profile) for method in METHODS.values() for profile in sorted(method.absent_from)],
)
def test_a_library_without_the_method_has_no_conventions_for_it(client, method, profile):
    """The refusal points at the profile."""
    with pytest.raises(InvalidRequest) as caught:
        client.explain(IMAGE, model=model_for(method), specs=["grad-cam", Spec(method, profile=profile)])

    assert ["specs[1].profile"] == [violation.field for violation in caught.value.field_violations]
