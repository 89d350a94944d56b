"""Profiles through a real server: the same method under the conventions of each library gives that library's map."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from support.nets import TinyNet
from support.servers import script_source, settings

from camserve.client import Client, InvalidRequest, Spec
from camserve.server.background import BackgroundServer
from camserve.server.cam.methods import METHODS
from camserve.server.jobs import Profile

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[Client]:
    """A client of a server with TinyNet."""
    source = script_source("tiny", TinyNet(), tmp_path_factory.mktemp("models"))
    with BackgroundServer(settings(), [source]) as server, Client(server.target) as client:
        yield client


@pytest.mark.parametrize("method", METHODS)
def test_every_profile_that_has_the_method_gives_a_map(client, method):
    """And the map says whose conventions were followed."""
    profiles = [profile for profile in Profile if profile not in METHODS[method].absent_from]
    specs = [Spec(method, profile=profile, encoding="float32") for profile in profiles]

    answer = client.explain(IMAGE, model="tiny", specs=specs)

    assert profiles == [heatmap.profile for heatmap in answer.heatmaps]


def test_conventions_differ(client):
    """Grad-CAM++ of the paper, with pytorch-grad-cam's epsilon, and with what torchcam computes: three maps."""
    specs = [Spec("grad-cam++", profile=profile, encoding="float32", rectify=False) for profile in Profile]

    paper, epsilon, cubed = (h.values for h in client.explain(IMAGE, model="tiny", specs=specs).heatmaps)

    assert not np.allclose(paper, epsilon, rtol=1e-3)
    assert not np.allclose(paper, cubed, rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "profile"),
    [(method.slug, profile) for method in METHODS.values() for profile in sorted(method.absent_from)],
)
def test_a_library_without_the_method_has_no_conventions_for_it(client, method, profile):
    """The refusal points at the profile."""
    with pytest.raises(InvalidRequest) as caught:
        client.explain(IMAGE, model="tiny", specs=["grad-cam", Spec(method, profile=profile)])

    assert ["specs[1].profile"] == [violation.field for violation in caught.value.field_violations]
