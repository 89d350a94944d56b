from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.jit import ScriptModule

from camserve.server.demo.evaluate import normalised
from camserve.server.demo.samples import SAMPLES, samples
from camserve.server.demo.surfaces import LABELS, TEST_FAMILIES, Surface


def _shipped() -> list[Path]:
    return sorted(SAMPLES.glob("*.jpg"))


def test_two_samples_per_class_are_shipped_and_small() -> None:
    """Every class has two samples of test families, all together below 400 kB."""
    names = [path.stem.split("-") for path in _shipped()]
    assert sorted(LABELS * 2) == sorted(label for label, _ in names)
    assert {family for _, family in names} <= set(TEST_FAMILIES)
    assert sum(path.stat().st_size for path in _shipped()) < 400_000


def test_shipped_samples_are_those_the_script_writes() -> None:
    """The files show the generated pictures, but for the loss of one more JPEG."""
    made = samples()
    assert sorted(made) == [path.stem for path in _shipped()]
    for path in _shipped():
        with Image.open(path) as image:
            difference = np.asarray(image, dtype=float) - made[path.stem].image
        assert np.abs(difference).mean() < 6, path.stem


def test_shipped_samples_are_classified_right(shipped: ScriptModule) -> None:
    """A first try with a sample shows the model at work."""
    for path in _shipped():
        with Image.open(path) as image:
            picture = np.asarray(image)
        surface = Surface(picture, np.zeros(picture.shape[:2], bool), 0, "")
        with torch.inference_mode():
            predicted = int(shipped(normalised([surface]).contiguous()).argmax())
        assert path.stem.split("-")[0] == LABELS[predicted], path.stem
