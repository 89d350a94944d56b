"""Pictures of surfaces, flawless or with one flaw, and where the flaw is.

Arrives: a seed. Leaves: `Surface`s in five balanced classes over the training families or over the test families.
`train.py` learns from them, `samples.py` saves a few, and tests ask `test_set` for the pictures behind published figures.
The same seed gives the same pictures; no picture depends on how many were asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from camserve.server.demo.camera import handled, photographed
from camserve.server.demo.defects import DEFECTS, LARGEST_AREA
from camserve.server.demo.fields import SIZE
from camserve.server.demo.textures import FAMILIES, TEST_FAMILIES, TRAINING_FAMILIES

__all__ = [
    "LABELS",
    "LARGEST_AREA",
    "SIZE",
    "TEST_FAMILIES",
    "TRAINING_FAMILIES",
    "Surface",
    "make_surface",
    "surface_at",
    "test_set",
]

LABELS = ("good", "scratch", "spot", "crack", "stain")
"""Class names in the order of the model's logits."""


@dataclasses.dataclass(frozen=True, slots=True)
class Surface:
    """One picture with its truth.

    Attributes:
        image: RGB, shape (h, w, 3).
        mask: True on the flaw, shape (h, w); all False on a good surface.
        label: index into `LABELS`.
        family: the texture family's name.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    label: int
    family: str


def make_surface(label: int, family: str, seed: tuple[int, ...]) -> Surface:
    """Makes one picture.

    Material, flaw and camera draw from streams of their own, so that the same seed with another label shows the same
    piece of material under the same light.

    Args:
        label: index into `LABELS`.
        family: a name in `TRAINING_FAMILIES` or `TEST_FAMILIES`.
        seed: non-negative integers.

    Raises:
        KeyError: there is no such family.
        IndexError: there is no such label.
    """
    material, flaw, camera = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3))
    texture = FAMILIES[family](material)
    base = 1 + material.uniform(0, 0.3) * material.uniform(-1, 1, 3).astype(np.float32)
    accent = material.uniform(0, 0.06) * material.uniform(-1, 1, 3).astype(np.float32)
    tone = 1 + np.float32(texture.contrast) * texture.tone
    light = np.maximum(base * tone[..., None] + texture.tint[..., None] * accent, np.float32(0.05))
    light = light * handled(camera)[..., None]
    mask = np.zeros((SIZE, SIZE), bool)
    if LABELS[label] in DEFECTS:
        defect = DEFECTS[LABELS[label]](flaw, texture.contrast)
        light, mask = light * defect.gain, defect.mask
    return Surface(photographed(light.astype(np.float32), camera), mask, label, family)


def surface_at(index: int, seed: int, families: tuple[str, ...]) -> Surface:
    """Makes the picture at one place of an endless series in which every family shows every class equally often."""
    label, family = index % len(LABELS), families[index // len(LABELS) % len(families)]
    # The first number keeps training and test series apart even where families or seeds are shared.
    return make_surface(label, family, (int(families == TEST_FAMILIES), seed, index))


def _series(count: int, seed: int, families: tuple[str, ...]) -> Iterator[Surface]:
    return (surface_at(index, seed, families) for index in range(count))


def test_set(count: int, seed: int = 0) -> list[Surface]:  # noqa: PT028  # Not a test, whatever its name.
    """Makes pictures of the families the model has never seen.

    Args:
        count: how many; a multiple of 20 is balanced over classes and families.
        seed: which series; published figures use 0.
    """
    return list(_series(count, seed, TEST_FAMILIES))


test_set.__test__ = False  # type: ignore[attr-defined]  # pytest would run an imported function of this name as a test.
