"""The flawless materials: one function per texture family, and which families are for training and which for the test.

Arrives: a random generator. Leaves: a `Texture`, the relief and the stain-free colour pattern of one piece of material, not
yet coloured, lit or photographed. `surfaces.py` calls; a test family shares no function with a training family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import MappingProxyType

import numpy as np

from camserve.server.demo.fields import SIZE, Field, cellular, coordinates, fractal, gaussian, standardised

__all__ = ["FAMILIES", "TEST_FAMILIES", "TRAINING_FAMILIES", "Texture"]


@dataclasses.dataclass(frozen=True, slots=True)
class Texture:
    """One piece of material before colour.

    Attributes:
        tone: brightness pattern, mean 0 and standard deviation 1.
        tint: where the second colour shows, mean 0 and standard deviation 1.
        contrast: how much one unit of tone changes the brightness, as a fraction of it.
    """

    tone: Field
    tint: Field
    contrast: float


def _relief(height: Field, angle: float) -> Field:
    """Lights a height field from one side: the slope along `angle`."""
    right: Field = np.gradient(height, axis=1)
    down: Field = np.gradient(height, axis=0)
    return standardised(right * np.float32(np.cos(angle)) + down * np.float32(np.sin(angle)))


def _angle(rng: np.random.Generator) -> float:
    return float(rng.uniform(0, 2 * np.pi))


def rolled_steel(rng: np.random.Generator) -> Texture:
    """Rolling direction seen as short streaks, with broad bands and fine grain."""
    angle = _angle(rng)
    streaks = gaussian(rng, rng.uniform(6, 14), rng.uniform(0.6, 1.3), angle=angle)
    bands = gaussian(rng, 60, rng.uniform(6, 15), angle=angle)
    grain = gaussian(rng, 0.5)
    tone = standardised(streaks + rng.uniform(0.3, 0.9) * bands + rng.uniform(0.3, 0.8) * grain)
    return Texture(tone, bands, rng.uniform(0.03, 0.10))


def cast_iron(rng: np.random.Generator) -> Texture:
    """Sand-cast skin: a rough relief of rounded grains, lit from a side."""
    grain = rng.uniform(1.0, 2.4)
    height = gaussian(rng, grain, floor=3 * grain) + rng.uniform(0, 0.6) * gaussian(rng, 0.6)
    return Texture(_relief(height, _angle(rng)), fractal(rng, 1.2), rng.uniform(0.06, 0.16))


def wood(rng: np.random.Generator) -> Texture:
    """Planed board: growth rings as warped bands, with fibres along them."""
    angle = _angle(rng)
    _, across = coordinates(angle)
    warp = gaussian(rng, rng.uniform(40, 80), rng.uniform(12, 25), angle=angle)
    phase = (across + rng.uniform(3, 9) * warp) / np.float32(rng.uniform(8, 18)) + np.float32(rng.random())
    rings = np.abs(phase % 1 - np.float32(rng.uniform(0.2, 0.8))) ** np.float32(0.8)
    fibres = gaussian(rng, rng.uniform(5, 12), rng.uniform(0.5, 0.9), angle=angle)
    tone = standardised(standardised(rings) + rng.uniform(0.5, 1.1) * fibres)
    return Texture(tone, standardised(rings), rng.uniform(0.06, 0.13))


def linen(rng: np.random.Generator) -> Texture:
    """Plain weave: threads passing over and under at right angles, uneven in thickness."""
    angle, pitch = _angle(rng), rng.uniform(3.2, 6.0)
    along, across = coordinates(angle)
    u = (along + 0.7 * gaussian(rng, 3, 25, angle=angle)) * np.float32(np.pi / pitch)
    v = (across + 0.7 * gaussian(rng, 25, 3, angle=angle)) * np.float32(np.pi / pitch)
    over = np.sign(np.sin(u) * np.sin(v))
    threads: Field = np.where(over > 0, np.abs(np.sin(u)), np.abs(np.sin(v))).astype(np.float32)
    slubs: Field = np.where(over > 0, gaussian(rng, 1, 10, angle=angle), gaussian(rng, 10, 1, angle=angle))
    tone = standardised(standardised(threads) + rng.uniform(0.2, 0.6) * slubs)
    return Texture(tone, standardised(over.astype(np.float32)), rng.uniform(0.07, 0.15))


def concrete(rng: np.random.Generator) -> Texture:
    """Cement skin: cloudy, with fine sand and pinholes smaller than any spot defect."""
    clouds, sand = fractal(rng, rng.uniform(1.1, 1.5), 60), gaussian(rng, 0.5)
    pores = gaussian(rng, rng.uniform(0.8, 1.2))
    pores = np.maximum(pores - np.float32(rng.uniform(2.2, 2.8)), 0)
    tone = standardised(clouds + rng.uniform(0.4, 0.9) * sand - 4 * pores)
    return Texture(tone, clouds, rng.uniform(0.04, 0.10))


def orange_peel(rng: np.random.Generator) -> Texture:
    """Sprayed paint: a soft rolling relief."""
    length = rng.uniform(2.2, 4.5)
    height = gaussian(rng, length, floor=2.5 * length)
    tone = standardised(_relief(height, _angle(rng)) + rng.uniform(0.1, 0.5) * gaussian(rng, 0.5))
    return Texture(tone, gaussian(rng, 30), rng.uniform(0.03, 0.10))


def hammered(rng: np.random.Generator) -> Texture:
    """Hammered sheet: shallow round dents meeting in ridges."""
    nearest, _, _ = cellular(rng, rng.uniform(9, 22))
    height = nearest**2 + 0.03 * gaussian(rng, 1.0)
    return Texture(_relief(height.astype(np.float32), _angle(rng)), gaussian(rng, 20), rng.uniform(0.05, 0.12))


def marble(rng: np.random.Generator) -> Texture:
    """Polished marble: wide soft veins in clouds; softer than any crack."""
    warp = fractal(rng, 1.8, 80)
    _, across = coordinates(_angle(rng))
    veins = np.abs(np.sin(across / np.float32(rng.uniform(14, 30)) + np.float32(rng.uniform(1.2, 2.2)) * warp))
    veins = -((1 - veins) ** np.float32(rng.uniform(2, 5)))
    tone = standardised(standardised(veins) + rng.uniform(0.5, 1.0) * fractal(rng, 1.3, 80))
    return Texture(tone, warp, rng.uniform(0.04, 0.10))


def felt(rng: np.random.Generator) -> Texture:
    """Pressed fibres: short threads in every direction."""
    start = _angle(rng)
    tone = np.zeros((SIZE, SIZE), np.float32)
    for turn in range(5):
        fibres = gaussian(rng, rng.uniform(3, 7), rng.uniform(0.5, 0.8), angle=start + turn * np.pi / 5)
        tone += fibres * fibres * fibres
    tone = standardised(np.clip(standardised(tone), -3, 3))
    return Texture(tone, fractal(rng, 1.0, 40), rng.uniform(0.05, 0.12))


def terrazzo(rng: np.random.Generator) -> Texture:
    """Ground composite: angular chips of many tones in a common binder."""
    _, border, value = cellular(rng, rng.uniform(5, 13))
    chips = np.where(border > rng.uniform(0.05, 0.2), value - np.float32(0.5), np.float32(0))
    tone = standardised(standardised(chips) + 0.3 * gaussian(rng, 0.6))
    return Texture(tone, standardised(value), rng.uniform(0.05, 0.14))


def ribbed(rng: np.random.Generator) -> Texture:
    """Extruded profile or milled face: even parallel ridges, slightly wavy."""
    angle = _angle(rng)
    _, across = coordinates(angle)
    phase = (across + rng.uniform(0, 1.5) * gaussian(rng, 40, 20, angle=angle)) * np.float32(
        2 * np.pi / rng.uniform(4, 14)
    )
    ridges = np.sin(phase) + np.float32(rng.uniform(0, 0.5)) * np.sin(2 * phase + np.float32(_angle(rng)))
    tone = standardised(standardised(ridges) + rng.uniform(0.2, 0.8) * gaussian(rng, 8, 0.7, angle=angle))
    return Texture(tone, gaussian(rng, 30), rng.uniform(0.04, 0.11))


def cork(rng: np.random.Generator) -> Texture:
    """Pressed cork: rounded granules with their own tones and dark joints."""
    _, border, value = cellular(rng, rng.uniform(6, 12))
    joints = np.exp(-border / np.float32(rng.uniform(0.08, 0.2)))
    tone = standardised(value - joints * np.float32(rng.uniform(0.3, 0.9)) + 0.3 * fractal(rng, 0.8))
    return Texture(tone, standardised(value), rng.uniform(0.06, 0.14))


def brushed(rng: np.random.Generator) -> Texture:
    """Brushed metal: long hairlines in one direction."""
    angle = _angle(rng)
    hairlines = gaussian(rng, rng.uniform(20, 45), rng.uniform(0.4, 0.7), angle=angle)
    sheen = gaussian(rng, 80, rng.uniform(10, 20), angle=angle)
    tone = standardised(hairlines + rng.uniform(0.1, 0.6) * sheen + rng.uniform(0.1, 0.4) * gaussian(rng, 0.4))
    return Texture(tone, sheen, rng.uniform(0.04, 0.10))


def granite(rng: np.random.Generator) -> Texture:
    """Polished granite: interlocking crystals of three minerals."""
    size = rng.uniform(1.3, 2.2)
    quartz, mica = gaussian(rng, size, floor=4 * size), gaussian(rng, size * 0.8, floor=4 * size)
    minerals = np.where(quartz > 0.5, np.float32(1), np.float32(0)) - np.where(
        mica > 1.0, np.float32(1.5), np.float32(0)
    )
    tone = standardised(standardised(minerals) + 0.4 * gaussian(rng, 0.6))
    return Texture(tone, quartz, rng.uniform(0.06, 0.14))


def leather(rng: np.random.Generator) -> Texture:
    """Grained leather: small pebbles parted by creases, lit from a side, with slow wrinkles."""
    _, border, _ = cellular(rng, rng.uniform(5, 9))
    pebbles = 1 - np.exp(-border / np.float32(0.3))
    height = standardised(pebbles + 0.15 * gaussian(rng, 1.0))
    tone = standardised(_relief(height, _angle(rng)) + 0.7 * height)
    wrinkles = gaussian(rng, 25, 5, angle=_angle(rng))
    return Texture(standardised(tone + 0.3 * wrinkles), gaussian(rng, 25), rng.uniform(0.05, 0.12))


def twill(rng: np.random.Generator) -> Texture:
    """Twill weave: diagonal ribs broken by the threads that make them."""
    angle, pitch = _angle(rng), rng.uniform(4.5, 8.0)
    along, across = coordinates(angle)
    across = across + 0.6 * gaussian(rng, 20, 5, angle=angle)
    ribs = np.sin((along + across) * np.float32(2 * np.pi / pitch))
    threads = np.sin(across * np.float32(4 * np.pi / pitch))
    yarn = gaussian(rng, 6, 0.8, angle=angle)
    tone = standardised(ribs + rng.uniform(0.3, 0.6) * threads + rng.uniform(0.3, 0.7) * yarn)
    return Texture(tone, standardised(ribs), rng.uniform(0.06, 0.13))


_TRAINING = (
    rolled_steel, cast_iron, wood, linen, concrete, orange_peel, hammered, marble, felt, terrazzo, ribbed, cork,
)  # fmt: skip
_TEST = (brushed, granite, leather, twill)

FAMILIES: MappingProxyType[str, Callable[[np.random.Generator], Texture]] = MappingProxyType(
    {maker.__name__: maker for maker in _TRAINING + _TEST}
)
"""Every family's maker by name."""

TRAINING_FAMILIES: tuple[str, ...] = tuple(maker.__name__ for maker in _TRAINING)
"""Families the shipped model has seen."""

TEST_FAMILIES: tuple[str, ...] = tuple(maker.__name__ for maker in _TEST)
"""Families it has never seen; every published figure is measured on these."""
