"""What a request can ask for besides a method and a layer, from the client through a real server and back."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from camserve.client import (
    Above,
    Box,
    Client,
    Difference,
    FailedPrecondition,
    Heatmap,
    InvalidRequest,
    Phrase,
    Region,
    Spec,
    TensorInput,
)


def explained(client: Client, image: object, *specs: Spec, **options: object) -> tuple[Heatmap, ...]:
    """The maps of specs that all succeed."""
    result = client.explain(image, model="surface", specs=specs, **options)
    result.raise_for_errors()
    return result.heatmaps


def test_evidence_against_is_the_other_side_of_evidence_for(client, samples):
    """The gradient is turned, so the unrectified map of Grad-CAM is too; the answer says which it is."""
    plain, turned = explained(
        client,
        samples[0],
        Spec("grad-cam", rectify=False, encoding="float32"),
        Spec("grad-cam", rectify=False, encoding="float32", polarity="against"),
    )

    np.testing.assert_allclose(turned.values, -plain.values, rtol=1e-4, atol=1e-6)
    assert ("for", "against") == (plain.target.polarity, turned.target.polarity)
    assert plain.target.value == turned.target.value


def test_a_difference_is_what_its_two_classes_differ_in(client, samples):
    """Grad-CAM's channel weights are linear in the score, and so is its map before the ReLU."""
    common = {"rectify": False, "encoding": "float32"}
    first, second, difference = explained(
        client,
        samples[0],
        Spec("grad-cam", target=0, **common),
        Spec("grad-cam", target=2, **common),
        Spec("grad-cam", target=Difference(0, 2, 0.5), **common),
    )

    np.testing.assert_allclose(difference.values, first.values - 0.5 * second.values, rtol=1e-3, atol=1e-5)
    assert (0, 2) == (difference.target.class_index, difference.target.other_class_index)


def test_every_class_above_a_threshold_gets_a_map(client, samples):
    """As many as the prediction says are above it."""
    result = client.explain(samples[0], model="surface", specs=[Spec("grad-cam", target=Above(0.01))])

    expected = [item.class_index for item in result.prediction.classes if item.probability > 0.01]
    assert expected == [item.target.class_index for item in result.heatmaps]


def test_regions_lie_on_the_source_where_the_map_is_strong(client, samples):
    """Strongest first; the first holds the map's largest value."""
    (item,) = explained(client, samples[0], Spec("layercam", encoding="float32", region_threshold=0.5, max_regions=2))

    assert 1 <= len(item.regions) <= 2
    first = item.regions[0]
    assert item.values.max() == pytest.approx(first.peak)
    assert 0 < first.share <= 1
    drawn = item.on_source()
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    box = first.box
    assert box.left <= column < box.left + box.width
    assert box.top <= row < box.top + box.height


def test_only_the_region_of_interest_is_looked_at(client, samples):
    """The prediction is that of the part cut out beforehand; the map lies on the whole source."""
    with Image.open(samples[0]) as image:
        whole = image.convert("RGB")
    box = Box(10, 20, whole.width // 2, whole.height // 2)
    cut = whole.crop((box.left, box.top, box.left + box.width, box.top + box.height))

    part = client.explain(whole, model="surface", specs=["grad-cam"], region_of_interest=box)
    alone = client.explain(cut, model="surface", specs=["grad-cam"])

    assert [item.logit for item in alone.prediction.classes] == [item.logit for item in part.prediction.classes]
    (inside,), (own,) = part.heatmaps, alone.heatmaps
    assert own.values.tolist() == inside.values.tolist()
    assert (whole.width, whole.height) == (inside.geometry.source_width, inside.geometry.source_height)
    assert (own.geometry.offset_x + 10, own.geometry.offset_y + 20) == pytest.approx(
        (inside.geometry.offset_x, inside.geometry.offset_y)
    )
    with pytest.raises(InvalidRequest, match="does not lie within"):
        client.explain(cut, model="surface", region_of_interest=Box(0, 0, 10_000, 1))


def test_a_map_of_the_input_keeps_its_channels_until_told_otherwise(client, samples):
    """Signed and apart by default; added up, clipped and drawn as a picture as "gray"."""
    colour, gray, drawn = explained(
        client,
        samples[0],
        Spec("vanilla-backprop", encoding="float32"),
        Spec("vanilla-backprop", encoding="float32", saliency="gray"),
        Spec("vanilla-backprop", encoding="overlay-png", saliency="gray"),
    )

    assert (("h", "w", "c"), 3) == (colour.axes, colour.values.shape[-1])
    assert (colour.values < 0).any()
    assert (("h", "w"), colour.values.shape[:2]) == (gray.axes, gray.values.shape)
    np.testing.assert_allclose(gray.values, colour.strength, rtol=1e-4, atol=1e-7)
    assert () == colour.layers == gray.layers
    assert drawn.overlay().size == colour.overlay().size


def test_random_choices_are_those_of_the_seed(client, samples):
    """The same map again, and another one for another seed."""
    specs = [Spec("rise", samples=16, seed=seed, encoding="float32") for seed in (7, 7, 8)]

    first, again, other = explained(client, samples[0], *specs, lane="bulk")

    assert first.raw_sha256 == again.raw_sha256 != other.raw_sha256
    assert 1.0 == first.completed


def test_concepts_come_one_map_each_and_are_about_no_class(client, samples):
    """Numbered from 0; neither index nor label is made up."""
    maps = explained(client, samples[0], Spec("deep-feature-factorisation", concepts=3))

    assert [0, 1, 2] == [item.target.concept for item in maps]
    assert {(None, "")} == {(item.target.class_index, item.target.label) for item in maps}


def test_the_stages_of_the_card_can_be_swept(client, samples):
    """Each gives a map, the later the coarser."""
    stages = client.model("surface").stages

    maps = explained(client, samples[0], *(Spec("layercam", layers=[stage]) for stage in stages))

    sizes = [item.height for item in maps]
    assert 2 <= len(sizes)
    assert sorted(sizes, reverse=True) == sizes


@pytest.mark.parametrize(
    ("spec", "options", "kind", "told"),
    [
        (Spec("grad-cam", samples=3), {}, InvalidRequest, "samples is not read by grad-cam"),
        (Spec("grad-cam", saliency="gray"), {}, InvalidRequest, "its map has no channels"),
        (Spec("eigen-cam", target=1), {}, InvalidRequest, "it makes one map, about no class"),
        (Spec("rise", layers=["layer1"]), {}, InvalidRequest, "which looks at the model's input"),
        (Spec("rise", eigen_smooth=True), {}, InvalidRequest, "cannot smooth rise"),
        (Spec("rise", augmentation_smooth=True), {}, InvalidRequest, "cannot smooth rise"),
        (Spec("vanilla-backprop", encoding="png8"), {}, InvalidRequest, "for signed channels"),
        (Spec("grad-cam", target=Phrase("a scratch")), {}, FailedPrecondition, "'text' does not fit"),
        (Spec("grad-cam", target=Region(point=(1, 1))), {}, FailedPrecondition, "'region' does not fit"),
        (Spec("deep-feature-factorisation", concepts=10_000), {}, InvalidRequest, "may give 10000 maps"),
        (
            Spec("grad-cam"),
            {"extra_inputs": {"mask": TensorInput(np.ones(1, np.float32))}},
            InvalidRequest,
            "takes no input besides the first",
        ),
    ],
)
def test_what_would_be_ignored_is_refused(client, samples, spec, options, kind, told):
    """At its field, before anything is looked at."""
    with pytest.raises(kind, match=told):
        client.explain(samples[0], model="surface", specs=[spec], **options)
