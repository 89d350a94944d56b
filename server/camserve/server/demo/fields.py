"""Scalar fields over the picture, from which textures, defects and lighting are made.

Arrives: a random generator and a few lengths in pixels. Leaves: float32 arrays of shape (SIZE, SIZE), most of them with
mean 0 and standard deviation 1. `textures.py`, `defects.py` and `camera.py` call these; nothing here knows of classes.
Noise is filtered in the frequency domain, which costs half a millisecond per field whatever its correlation length.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "SIZE",
    "Field",
    "Positions",
    "cellular",
    "coordinates",
    "fractal",
    "gaussian",
    "polyline_distance",
    "positions",
    "smoothed",
    "standardised",
]

SIZE = 160
"""Side of every generated picture, in pixels."""

Field = NDArray[np.float32]
"""Array of shape (SIZE, SIZE)."""

Positions = NDArray[np.float32]
"""Pixel centres, or points in pixel units; the last axis is (y, x)."""


@functools.cache
def positions() -> tuple[Field, Field]:
    """Gives the y and x of every pixel, in pixels from the top-left pixel's centre."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    return y, x


@functools.cache
def _frequencies() -> tuple[Field, Field]:
    """Gives fy and fx in cycles per pixel, shape (SIZE, SIZE // 2 + 1), as `numpy.fft.rfft2` orders them."""
    fy, fx = np.meshgrid(np.fft.fftfreq(SIZE), np.fft.rfftfreq(SIZE), indexing="ij")
    return fy.astype(np.float32), fx.astype(np.float32)


def coordinates(angle: float) -> tuple[Field, Field]:
    """Gives pixel coordinates along and across a direction, measured from the picture's centre.

    Args:
        angle: direction in radians; 0 points right.

    Returns:
        (along, across), both in pixels.
    """
    y, x = positions()
    centre = (SIZE - 1) / 2
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return (x - centre) * cosine + (y - centre) * sine, (y - centre) * cosine - (x - centre) * sine


def standardised(field: Field) -> Field:
    """Shifts and scales a field to mean 0 and standard deviation 1; a constant field becomes zero."""
    centred = field - field.mean()
    scaled: Field = (centred / (centred.std() + np.float32(1e-6))).astype(np.float32)
    return scaled


def _filtered(rng: np.random.Generator, response: Field) -> Field:
    white = rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    return standardised(np.fft.irfft2(np.fft.rfft2(white) * response, s=(SIZE, SIZE)).astype(np.float32))


def gaussian(
    rng: np.random.Generator, along: float, across: float | None = None, *, angle: float = 0.0, floor: float = 0.0
) -> Field:
    """Makes Gaussian noise of given correlation lengths.

    Args:
        rng: source of randomness.
        along: correlation length along `angle`, in pixels.
        across: correlation length across it; the same when absent.
        angle: direction of the first length, in radians.
        floor: correlation length above which everything is removed (a band-pass); 0 keeps it.

    Returns:
        A field with mean 0 and standard deviation 1.
    """
    fy, fx = _frequencies()
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = fx * cosine + fy * sine, fy * cosine - fx * sine
    across = along if across is None else across
    response = np.exp(-2.0 * np.pi**2 * ((along * u) ** 2 + (across * v) ** 2) / 2)
    if floor > 0:
        response = response * (1 - np.exp(-2.0 * np.pi**2 * floor**2 * (u**2 + v**2) / 2))
    return _filtered(rng, response.astype(np.float32))


def fractal(rng: np.random.Generator, exponent: float, longest: float = SIZE) -> Field:
    """Makes noise whose amplitude falls as frequency to the power `-exponent`, up to a longest wavelength in pixels."""
    fy, fx = _frequencies()
    radius = np.sqrt(fy**2 + fx**2)
    response = (radius + 1.0 / longest) ** np.float32(-exponent)
    response[0, 0] = 0
    return _filtered(rng, response.astype(np.float32))


def cellular(rng: np.random.Generator, pitch: float) -> tuple[Field, Field, Field]:
    """Makes a Voronoi pattern from one random point per cell of a jittered grid.

    Args:
        rng: source of randomness.
        pitch: mean distance of neighbouring points, in pixels.

    Returns:
        Distance to the nearest point, distance to the border with the second nearest (0 on the border), both in units of
        `pitch`, and a random value in [0, 1) per cell.
    """
    count = int(np.ceil(SIZE / pitch)) + 4
    jitter = rng.random((count, count, 2), dtype=np.float32)
    tone = rng.random((count, count), dtype=np.float32)
    y, x = positions()
    y, x = y / np.float32(pitch) + 2, x / np.float32(pitch) + 2
    row, column = y.astype(np.intp), x.astype(np.intp)
    nearest = np.full((SIZE, SIZE), 9, np.float32)
    second = nearest.copy()
    value = np.zeros((SIZE, SIZE), np.float32)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            r, c = row + down, column + right
            distance = np.hypot(r + jitter[r, c, 0] - y, c + jitter[r, c, 1] - x)
            second = np.minimum(second, np.maximum(nearest, distance))
            closer = distance < nearest
            value = np.where(closer, tone[r, c], value)
            nearest = np.minimum(nearest, distance)
    return nearest, second - nearest, value


def polyline_distance(points: Positions) -> tuple[Field, Field]:
    """Measures every pixel's distance to a polyline.

    Args:
        points: corners, shape (n, 2), n at least 2, in pixels as (y, x).

    Returns:
        Distance in pixels, and the place of the nearest point along the line: 0 at its first corner, 1 at its last.
    """
    y, x = positions()
    best = np.full((SIZE, SIZE), np.inf, np.float32)
    place = np.zeros((SIZE, SIZE), np.float32)
    segments = len(points) - 1
    for index, ((y0, x0), (y1, x1)) in enumerate(itertools.pairwise(points)):
        dy, dx = y1 - y0, x1 - x0
        t = np.clip(((y - y0) * dy + (x - x0) * dx) / (dy * dy + dx * dx + np.float32(1e-6)), 0, 1)
        distance = (y - y0 - t * dy) ** 2 + (x - x0 - t * dx) ** 2
        closer = distance < best
        best = np.where(closer, distance, best)
        place = np.where(closer, (index + t) / segments, place)
    return np.sqrt(best), place.astype(np.float32)


def smoothed(picture: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Blurs the first two axes by a Gaussian of `sigma` pixels, repeating the edge pixels outwards."""
    if sigma < 0.2:
        return picture
    reach = int(np.ceil(3 * sigma))
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        padding = [(reach, reach) if a == axis else (0, 0) for a in range(picture.ndim)]
        padded = np.pad(picture, padding, mode="edge")
        length = picture.shape[axis]
        blurred = np.zeros_like(picture)
        for shift, weight in enumerate(weights):
            blurred += weight * padded.take(range(shift, shift + length), axis)
        picture = blurred
    return picture
