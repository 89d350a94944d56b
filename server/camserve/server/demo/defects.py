"""The flaws: one function per defect class, each giving where the flaw is and how it changes the light.

Arrives: a random generator and the texture's contrast, to which the flaw's own is tied so that it is as visible on a coarse
material as on a smooth one. Leaves: a `Defect`. `surfaces.py` calls. Class is told by shape alone: lighter and darker,
greyer and more coloured flaws occur in every class but cracks, which are always darker, as real ones are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from camserve.server.demo.fields import SIZE, Field, gaussian, polyline_distance, positions, smoothed

__all__ = ["DEFECTS", "LARGEST_AREA", "Defect"]

LARGEST_AREA = 0.05
"""Largest part of the picture a flaw may cover."""

_PLAIN = np.ones(3, np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class Defect:
    """One flaw.

    Attributes:
        gain: factor on the light, shape (h, w, 3); 1 where the surface is sound.
        mask: True on the flaw, shape (h, w).
    """

    gain: NDArray[np.float32]
    mask: NDArray[np.bool_]


def _strength(rng: np.random.Generator, contrast: float, low: float, high: float) -> float:
    """Draws how strongly the light changes, as a fraction: at least `low`, more on a contrasty texture."""
    return float(min(rng.uniform(low, high) + 2.0 * contrast, 0.75))


def _gain(change: Field, colour: NDArray[np.float32]) -> NDArray[np.float32]:
    gain: NDArray[np.float32] = np.maximum(1 + change[..., None] * colour, np.float32(0.08))
    return gain


def _centre(rng: np.random.Generator) -> NDArray[np.float32]:
    return rng.uniform(0.2 * SIZE, 0.8 * SIZE, 2).astype(np.float32)


def scratch(rng: np.random.Generator, contrast: float) -> Defect:
    """Draws a long, thin, almost straight groove, tapering at its ends, with a lit and a shaded flank."""
    length, angle = rng.uniform(45, 110), rng.uniform(0, 2 * np.pi)
    t = np.linspace(-0.5, 0.5, 12, dtype=np.float32)[:, None]
    direction = np.array([np.sin(angle), np.cos(angle)], np.float32)
    normal = np.array([direction[1], -direction[0]], np.float32)
    bend = np.float32(rng.uniform(-0.08, 0.08) * length)
    middle = np.clip(_centre(rng), 0.3 * SIZE, 0.7 * SIZE)
    line = middle + t * np.float32(length) * direction + (4 * t**2) * bend * normal
    distance, place = polyline_distance(line)
    width = np.float32(rng.uniform(0.7, 1.3)) * np.clip(4 * np.minimum(place, 1 - place) + 0.5, 0, 1)
    core = np.exp(-0.5 * (distance / width) ** 2)
    shift = np.round(normal * 2).astype(int)
    flank = np.roll(core, (int(shift[0]), int(shift[1])), (0, 1))
    sign = rng.choice([-1.0, 1.0])
    change = sign * _strength(rng, contrast, 0.25, 0.5) * (core - rng.uniform(0.2, 0.6) * flank)
    return Defect(_gain(change.astype(np.float32), _PLAIN), distance <= np.maximum(width, 0.75))


def _walk(rng: np.random.Generator, start: NDArray[np.float32], angle: float, steps: int) -> NDArray[np.float32]:
    """Walks in jagged steps of 3 to 6 pixels around a slowly turning heading."""
    headings = angle + np.cumsum(rng.normal(0, 0.15, steps)) + rng.normal(0, 0.6, steps)
    strides = rng.uniform(3, 6, steps)
    moves = np.stack([np.sin(headings) * strides, np.cos(headings) * strides], axis=1)
    corners: NDArray[np.float32] = (start + np.concatenate([np.zeros((1, 2)), np.cumsum(moves, axis=0)])).astype(
        np.float32
    )
    return corners


def crack(rng: np.random.Generator, contrast: float) -> Defect:
    """Draws a dark, jagged, branching line of uneven width."""
    angle, steps = rng.uniform(0, 2 * np.pi), int(rng.integers(11, 20))
    reach = np.array([np.sin(angle), np.cos(angle)], np.float32) * np.float32(steps * 2.0)
    trunk = _walk(rng, np.clip(_centre(rng), 0.35 * SIZE, 0.65 * SIZE) - reach, angle, steps)
    branches = [trunk]
    for _ in range(int(rng.integers(1, 4))):
        origin = trunk[int(rng.integers(2, len(trunk) - 2))]
        side = rng.choice([-1.0, 1.0]) * rng.uniform(0.5, 1.1)
        branches.append(_walk(rng, origin, angle + side, int(rng.integers(3, 8))))
    core = np.zeros((SIZE, SIZE), np.float32)
    mask = np.zeros((SIZE, SIZE), bool)
    uneven = 1 + 0.35 * gaussian(rng, 4)
    for number, line in enumerate(branches):
        distance, place = polyline_distance(line)
        thickness = rng.uniform(0.8, 1.4) * (1.0 if number == 0 else 0.75)
        width = np.clip(thickness * uneven * (1.15 - 0.6 * place), 0.5, 2.2)
        core = np.maximum(core, np.exp(-0.5 * (distance / width) ** 2))
        mask |= distance <= np.maximum(width, 0.75)
    change = -_strength(rng, contrast, 0.35, 0.6) * core
    return Defect(_gain(change.astype(np.float32), _PLAIN), mask)


def _blob(rng: np.random.Generator, centre: NDArray[np.float32], radius: float, uneven: float) -> Field:
    """Gives the distance outside a round shape of uneven outline, in pixels; negative inside."""
    y, x = positions()
    dy, dx = y - centre[0], x - centre[1]
    angle = np.arctan2(dy, dx)
    outline = np.ones((SIZE, SIZE), np.float32)
    for order in (2, 3, 4, 5):
        amplitude = np.float32(rng.normal(0, uneven / order))
        outline += amplitude * np.cos(order * angle + np.float32(rng.uniform(0, 2 * np.pi)))
    outside: Field = (np.hypot(dy, dx) - np.float32(radius) * np.clip(outline, 0.5, 1.5)).astype(np.float32)
    return outside


def spot(rng: np.random.Generator, contrast: float) -> Defect:
    """Draws a small pit or inclusion with a sharp border and shading across it; sometimes two or three together."""
    change = np.zeros((SIZE, SIZE), np.float32)
    mask = np.zeros((SIZE, SIZE), bool)
    centre, sign = _centre(rng), rng.choice([-1.0, 1.0])
    strength = _strength(rng, contrast, 0.25, 0.5)
    y, x = positions()
    light = rng.uniform(0, 2 * np.pi)
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        radius = rng.uniform(3.0, 6.5)
        place = np.clip(centre + rng.normal(0, 11, 2), 0.1 * SIZE, 0.9 * SIZE).astype(np.float32)
        outside = _blob(rng, place, radius, 0.12)
        inside = 1 / (1 + np.exp(np.clip(outside / np.float32(0.5), -30, 30)))
        slope = ((y - place[0]) * np.sin(light) + (x - place[1]) * np.cos(light)) / radius
        change += (sign + rng.uniform(0.1, 0.5) * slope).astype(np.float32) * inside
        mask |= outside <= 0
    return Defect(_gain(np.clip(change, -1.5, 1.5) * np.float32(strength), _PLAIN), mask)


def stain(rng: np.random.Generator, contrast: float) -> Defect:
    """Draws a soft-edged discolouration of uneven outline, through which the texture still shows."""
    radius = rng.uniform(12, 18)
    ragged = rng.uniform(0.8, 2.0) * gaussian(rng, 4)
    outside = _blob(rng, _centre(rng), radius, 0.30) + ragged
    # Shrinks until it fits; ten pixels of radius would always do.
    while (outside <= 0).mean() > LARGEST_AREA:
        outside = outside + np.float32(1)
    softness = rng.uniform(0.8, 2.2)
    inside = 1 / (1 + np.exp(np.clip(outside / np.float32(softness), -30, 30)))
    rim = np.exp(-0.5 * ((outside + 2) / np.float32(1.6)) ** 2)
    body = inside * (1 + 0.15 * gaussian(rng, 6)) + rng.uniform(0, 0.6) * rim
    colour = _PLAIN + rng.uniform(-0.5, 0.5, 3).astype(np.float32)
    sign = rng.choice([-1.0, 1.0], p=[0.7, 0.3])
    change = sign * _strength(rng, 0.5 * contrast, 0.15, 0.32) * smoothed(body.astype(np.float32), 0.6)
    return Defect(_gain(change.astype(np.float32), colour), outside <= 0)


DEFECTS: MappingProxyType[str, Callable[[np.random.Generator, float], Defect]] = MappingProxyType(
    {"scratch": scratch, "spot": spot, "crack": crack, "stain": stain}
)
"""Every defect class's maker by label."""
