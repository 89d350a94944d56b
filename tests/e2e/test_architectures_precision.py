"""The shipped model in other precisions through a real server: the same answers and all but the same maps as in float32."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.architectures import served

from camserve.client import Client, Result, Spec
from camserve.server.cam.methods import METHODS, Layerwise
from camserve.server.models.sources import demo_sources

LAYERWISE = [slug for slug, method in METHODS.items() if isinstance(method.arithmetic, Layerwise)]
# Random weights of channels, and a mask of what lies beyond a threshold, follow no gradient.
LARGEST = [slug for slug in LAYERWISE if slug not in {"random-cam", "fem"}]


@pytest.fixture(scope="module")
def client():
    """One archive, four times."""

    def make(_folder):
        (source,) = demo_sources()
        return [
            source,
            *(
                dataclasses.replace(source, name=name, config=source.config.model_copy(update={"precision": name}))
                for name in ("bfloat16", "float16", "float64")
            ),
        ]

    with served(make) as client:
        yield client


def explained(client: Client, image: object, model: str, specs: list[Spec]) -> Result:
    """All specs succeed."""
    result = client.explain(image, model=model, specs=specs)
    result.raise_for_errors()
    return result


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of the strongest fifth of the cells."""
    count = max(1, one.size // 5)
    first, second = (set(np.argsort(-values.ravel(), kind="stable")[:count].tolist()) for values in (one, other))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize("model", ["bfloat16", "float16", "float64"])
def test_maps_are_those_of_float32(client, samples, model):
    """Every method of layers: correlation above 0.999, and the strongest fifth agrees by nine tenths."""
    assert model == client.model(model).dtype
    specs = [Spec(slug, encoding="float32", rectify=False) for slug in LARGEST]
    image = next(path for path in samples if path.name.startswith("crack"))

    expected, got = (explained(client, image, name, specs) for name in ("surface", model))

    assert expected.prediction.label == got.prediction.label
    assert len(specs) == len(got.heatmaps)
    for one, other in zip(expected.heatmaps, got.heatmaps, strict=True):
        assert np.corrcoef(one.values.ravel(), other.values.ravel())[0, 1] > 0.999, one.method
        assert overlap(one.values, other.values) > 0.9, one.method


@pytest.mark.parametrize("model", ["bfloat16", "float16"])
def test_small_gradients_do_not_vanish_in_the_statistics(client, samples, model):
    """The gradient of a saturated softmax is tiny, and its square is 0 in half precision: sums of it are taken in float32."""
    specs = [
        Spec(slug, score="softmax", encoding="float32", rectify=False)
        for slug in ("grad-cam", "grad-cam++", "xgrad-cam", "layercam", "smooth-grad-cam++", "eigen-grad-cam")
        if slug != "smooth-grad-cam++" or model == "bfloat16"  # Many passes, and float16 is slow on a CPU.
    ]

    got = explained(client, samples[0], model, specs)

    for heatmap in got.heatmaps:
        assert np.isfinite(heatmap.values).all()
        assert not heatmap.flags & {"non-finite", "empty", "constant"}, heatmap.method


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bfloat16", "float16"])
def test_tries_and_maps_of_the_input(client, samples, model):
    """Differences of scores and gradients of single pixels lose more of their bits: what they point at stays."""
    specs = [
        Spec("score-cam", channels=8, encoding="float32", rectify=False),
        Spec("ss-cam", channels=8, samples=4, encoding="float32", rectify=False),
        Spec("occlusion", window=32, stride=32, encoding="float32"),
        Spec("integrated-gradients", steps=8, encoding="float32"),
        Spec("guided-backprop", encoding="float32"),
        Spec("fullgrad", encoding="float32"),
    ]

    expected, got = (explained(client, samples[0], name, specs) for name in ("surface", model))

    for one, other in zip(expected.heatmaps, got.heatmaps, strict=True):
        assert np.corrcoef(one.values.ravel(), other.values.ravel())[0, 1] > 0.99, one.method
