"""What requests of the load generator are about: image files, made-up photographs, or random tensors of the model's own shape.

`command.py` picks one. What is made up comes from a seed, so that a run can be repeated on another machine with the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from PIL import Image

from camserve.client.bench.mix import input_bytes
from camserve.client.cards import ModelCard
from camserve.client.files import STDIN, find_images
from camserve.client.inputs import AnyInput, TensorInput

_LARGEST_BYTES: Final = 1 << 30
_BLOB_PIXELS: Final = 32
_DTYPES: Final = frozenset({"float16", "float32", "float64", "uint8"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The inputs of a run.

    Attributes:
        name: for reports, such as "16 synthetic JPEGs of 640 x 480".
        first: one of them, to ask the server once before the load.
        inputs: each as the part of a request.
    """

    name: str
    first: AnyInput
    inputs: tuple[bytes, ...]

    @property
    def mean_bytes(self) -> float:
        """Mean size of an input as it is sent."""
        return sum(map(len, self.inputs)) / len(self.inputs)


def from_files(arguments: Sequence[str]) -> Source:
    """Returns image files as they are, held in memory.

    Raises:
        ValueError: there are none, or they are more than a gibibyte.
        InvalidInput: a file that cannot be read; whether it is an image, the server will say.
    """
    if STDIN in arguments:
        raise ValueError("images are sent again and again and cannot come from standard input; give files")
    paths = [file.path for file in find_images(arguments)]
    if not paths:
        raise ValueError(f"no images in {', '.join(arguments)}")
    inputs: list[bytes] = []
    total = 0
    for path in paths:
        inputs.append(input_bytes(path))
        total += len(inputs[-1])
        if total > _LARGEST_BYTES:
            raise ValueError(
                f"{len(paths)} images are more than a gibibyte, all of which is held in memory; give fewer"
            )
    name = f"{len(paths)} image files" if len(paths) > 1 else "1 image file"
    return Source(name=name, first=paths[0], inputs=tuple(inputs))


def synthetic(width: int, height: int, count: int, seed: int) -> Source:
    """Returns made-up photographs: soft blobs of colour with a little noise, which JPEG makes about as large as real ones.

    Args:
        width: pixels.
        height: pixels.
        count: how many different ones.
        seed: the same seed gives the same pictures.
    """
    generator = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        cells = (max(height // _BLOB_PIXELS, 2), max(width // _BLOB_PIXELS, 2), 3)
        blobs = Image.fromarray(generator.integers(0, 256, cells, dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        noise = generator.normal(0, 6, (height, width, 1))
        pixels = np.clip(np.asarray(blobs, np.float64) + noise, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    name = f"{count} synthetic JPEGs of {width} x {height}"
    return Source(name=name, first=files[0], inputs=tuple(map(input_bytes, files)))


def tensors(card: ModelCard, count: int, seed: int) -> Source:
    """Returns random tensors of the model's own input shape: nothing is decoded or resized.

    Raises:
        ValueError: the card tells no fixed shape.
    """
    shape = card.input.shape
    if not shape or min(shape) < 1:
        raise ValueError(f"the card of {card.name} tells no fixed input shape; give images in place of --tensor")
    generator = np.random.default_rng(seed)
    made = [TensorInput(generator.standard_normal(shape, dtype=np.float32)) for _ in range(count)]
    name = f"{count} random tensors of {' x '.join(map(str, shape))}"
    return Source(name=name, first=made[0], inputs=tuple(map(input_bytes, made)))


def extra_inputs(card: ModelCard, seed: int) -> Mapping[str, TensorInput]:
    """Returns a random tensor for each further input that the model takes; the same in every request.

    Raises:
        ValueError: one of them is of a dtype that cannot be sent.
    """
    generator = np.random.default_rng(seed)
    made = {}
    for extra in card.extra_inputs:
        if extra.dtype not in _DTYPES or min(extra.shape, default=1) < 1:
            raise ValueError(
                f"input {extra.name} of {card.name} is {extra.dtype} {extra.shape}, which cannot be made up here"
            )
        made[extra.name] = TensorInput(generator.standard_normal(extra.shape).astype(extra.dtype))
    return made
