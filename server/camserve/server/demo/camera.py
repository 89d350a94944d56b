"""What happens to every picture whatever is on it: harmless marks, uneven light, exposure, blur, noise and JPEG.

Arrives: a surface's light as float, (h, w, 3). Leaves: the photograph as uint8. `surfaces.py` calls it for all classes
alike, with draws that do not depend on the class, so that none of this tells good from flawed.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from camserve.server.demo.fields import Field, coordinates, gaussian, positions, smoothed

__all__ = ["handled", "photographed"]


def handled(rng: np.random.Generator) -> Field:
    """Draws the harmless marks of handling: faint broad edge-to-edge lines, dust, and slow clouds.

    Returns:
        Factor on the light, shape (h, w). Lines are broader and fainter than scratches and end nowhere; dust is at most
        about two pixels wide where the smallest spot is six.
    """
    marks = np.zeros_like(positions()[0])
    for _ in range(int(rng.integers(0, 4))):
        _, across = coordinates(rng.uniform(0, np.pi))
        offset, width = rng.uniform(-60, 60), rng.uniform(1.5, 4.0)
        marks += rng.uniform(-0.07, 0.07) * np.exp(-0.5 * ((across - offset) / np.float32(width)) ** 2)
    dust = np.zeros_like(marks)
    count = int(rng.integers(0, 40))
    rows, columns = rng.integers(0, len(dust), (2, count))
    dust[rows, columns] = rng.uniform(-1.0, 1.0, count)
    marks += smoothed(dust, rng.uniform(0.4, 0.7))
    marks += rng.uniform(0.0, 0.05) * gaussian(rng, rng.uniform(12, 40))
    return np.maximum(1 + marks, np.float32(0.2)).astype(np.float32)


def _illumination(rng: np.random.Generator) -> Field:
    """Draws the light's fall-off: a gradient over the picture and a vignette."""
    along, across = coordinates(rng.uniform(0, 2 * np.pi))
    half = np.float32(len(along) / 2)
    vignette = rng.uniform(0, 0.25) * (along**2 + across**2) / (2 * half**2)
    return np.maximum(1 + rng.uniform(0, 0.3) * along / half - vignette, np.float32(0.2)).astype(np.float32)


def photographed(light: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Takes the picture.

    The exposure is set so that the mean brightness is a draw of its own: a flaw cannot be told by the mean.

    Args:
        light: light leaving the surface, shape (h, w, 3), any positive scale.
        rng: source of randomness.

    Returns:
        The photograph, shape (h, w, 3), after a JPEG round trip.
    """
    light = light * _illumination(rng)[..., None]
    light = light * np.float32(rng.uniform(75, 175) / light.mean())
    light = smoothed(light, rng.uniform(0.0, 0.9))
    noise = rng.standard_normal(light.shape, dtype=np.float32)
    picture = np.clip(light + np.float32(rng.uniform(0.5, 6.0)) * noise, 0, 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=int(rng.integers(65, 97)))
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))
