"""One request, from file to picture, through a real server."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camserve.client import Client, Heatmap, Kth, Prediction, Spec, SpecError, Summary, TopK

METHODS = ("cam", "grad-cam", "grad-cam++", "xgrad-cam", "hirescam", "layercam", "eigen-cam")


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of an image file."""
    with Image.open(path) as image:
        return image.size


def test_readme_call(client, samples):
    """The call of README gives a label, raw values and an overlay of the image's size."""
    scratch = next(path for path in samples if path.name.startswith("scratch"))

    result = client.explain(
        scratch, model="surface", specs=[Spec("grad-cam"), Spec("layercam", layers=["layer2"], target=3)]
    )

    assert result.prediction.label == "scratch"
    first, second = result.heatmaps
    assert first.values.dtype == np.float32
    assert first.values.ndim == 2
    assert (second.target.class_index, second.layers) == (3, ("layer2",))
    assert first.overlay().size == size_of(scratch)


def test_order_of_events(client, samples):
    """The prediction comes first and the summary last; maps of one spec come in order of their target."""
    events = list(client.stream(samples[0], model="surface", specs=[Spec("grad-cam", target=TopK(3)), "eigen-cam"]))

    assert isinstance(events[0], Prediction)
    assert isinstance(events[-1], Summary)
    assert [0, 1, 2] == [event.target_index for event in events[1:-1] if event.spec_index == 0]
    assert [3, 3, 3] == [event.target_count for event in events[1:-1] if event.spec_index == 0]


def test_no_specs_gives_prediction_only(client, samples):
    """A request without specs is an ordinary prediction."""
    events = list(client.stream(samples[0], model="surface"))

    assert [Prediction, Summary] == [type(event) for event in events]


@pytest.mark.parametrize("method", METHODS)
def test_every_method(client, samples, method):
    """Every method gives a finite map at the default layer, in the layer's resolution."""
    result = client.explain(samples[0], model="surface", specs=[Spec(method, encoding="float32")])

    card = client.model("surface")
    layer = next(layer for layer in card.layers if layer.name == card.default_layer)
    (heatmap,) = result.heatmaps
    assert tuple(layer.map_shape) == heatmap.values.shape
    assert np.isfinite(heatmap.values).all()
    assert heatmap.raw_sha256 == hashlib.sha256(heatmap.values.astype("<f4").tobytes()).hexdigest()


@pytest.mark.parametrize("encoding", ["float32", "float16", "uint8", "png8", "png16"])
@pytest.mark.parametrize("size", ["layer", "input", "source"])
def test_encodings_carry_the_same_map(client, samples, encoding, size):
    """Every encoding decodes to the same values within its declared loss, at every size."""
    exact = Spec("grad-cam", encoding="float32", size=size)
    result = client.explain(samples[0], model="surface", specs=[exact, Spec("grad-cam", encoding=encoding, size=size)])

    expected, got = result.heatmaps
    span = float(expected.values.max() - expected.values.min())
    step = {"uint8": span / 255, "png8": span / 255, "png16": span / 65535}.get(encoding, span * 2e-3)
    assert expected.values.shape == got.values.shape
    assert np.abs(expected.values - got.values).max() <= step / 2 + 1e-6 * span


def test_client_enlarges_as_the_server(client, samples):
    """A map sent at layer size and placed by the client equals the server's map at source size."""
    specs = [Spec("layercam", encoding="float32"), Spec("layercam", encoding="float32", size="source")]

    small, large = client.explain(samples[0], model="surface", specs=specs).heatmaps

    np.testing.assert_allclose(small.on_source(), large.values, rtol=0, atol=1e-5 * float(large.values.max()))


@pytest.mark.parametrize("encoding", ["overlay-png", "overlay-jpeg", "overlay-webp"])
def test_overlay_from_server(client, samples, encoding):
    """An overlay is a picture of the source's size."""
    result = client.explain(samples[0], model="surface", specs=[Spec("grad-cam", encoding=encoding)])

    assert result.heatmaps[0].overlay().size == size_of(samples[0])


def test_targets(client, samples):
    """Predicted class, index, label and k-th name the classes they say."""
    labels = client.model("surface").labels
    result = client.explain(
        samples[0],
        model="surface",
        specs=[Spec("grad-cam", target=target) for target in (None, 2, "stain", Kth(2))],
        top_k=5,
    )

    ranked = [entry.class_index for entry in result.prediction.classes]
    expected = [ranked[0], 2, labels.index("stain"), ranked[1]]
    assert expected == [heatmap.target.class_index for heatmap in result.heatmaps]


def test_softmax_target(client, samples):
    """A softmax target's value is the class's probability."""
    result = client.explain(samples[0], model="surface", specs=[Spec("grad-cam", score="softmax", target=1)], top_k=5)

    probability = next(entry.probability for entry in result.prediction.classes if entry.class_index == 1)
    assert probability == pytest.approx(result.heatmaps[0].target.value, rel=1e-4)


def test_several_layers_are_fused(client, samples):
    """Maps of several layers become one at the finest layer's resolution."""
    layers = ["layer2", "layer4"]
    card = client.model("surface")
    sizes = [layer.map_shape for layer in card.layers if layer.name in layers]
    specs = [Spec("layercam", layers=layers, fusion=fusion) for fusion in ("mean", "max", "product", "layercam")]

    result = client.explain(samples[0], model="surface", specs=specs)

    assert not result.errors
    assert [max(map(tuple, sizes))] * 4 == [heatmap.values.shape for heatmap in result.heatmaps]


def test_arrays_and_frames(client, samples):
    """The same pixels sent as a lossless file and as a raw frame give the same bits."""
    with Image.open(samples[0]) as file:
        image = file.convert("RGB")

    results = [
        client.explain(sent, model="surface", specs=[Spec("grad-cam", encoding="float32")])
        for sent in (image, np.asarray(image))
    ]

    assert results[0].heatmaps[0].raw_sha256 == results[1].heatmaps[0].raw_sha256


def test_events_are_typed(client, samples):
    """Streams yield the client's own records."""
    kinds = {type(event) for event in client.stream(samples[0], model="surface", specs=["grad-cam"])}

    assert kinds <= {Prediction, Heatmap, SpecError, Summary}


def test_client_is_shared_by_threads(demo_server, samples):
    """explain_many keeps the order of its input."""
    with Client(demo_server.target) as client:
        one_by_one = [client.explain(path, model="surface").prediction.label for path in samples]
        together = [result.prediction.label for result in client.explain_many(samples, model="surface", concurrency=8)]

    assert one_by_one == together
