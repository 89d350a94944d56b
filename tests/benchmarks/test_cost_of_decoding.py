"""What the decode stage costs: from a photograph's JPEG file to ResNet's input, and how much of that is the decoder's own work.

Printed by `make bench`, on one thread, in processor time: decoding shares the machine with the model. Machines differ, so only
ratios inside one run count: the variants take turns, and the medians over the rounds are compared.
"""

from __future__ import annotations

import io
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import skimage.data
import torch
import torchvision
from PIL import Image, ImageOps

from camserve.server.decode import DecodeLimits, decode
from camserve.server.image_header import read_header
from camserve.server.jobs import EncodedImage
from camserve.server.models.recipe import InputRecipe
from camserve.server.preprocess import place, sample

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

RECIPE = InputRecipe.imagenet()
LIMITS = DecodeLimits()
# (width, height): rounds.
SIZES = {(224, 224): 41, (640, 480): 41, (1920, 1080): 15, (4000, 3000): 5}
KINDS = {
    "4:2:0": {"subsampling": 2},
    "4:4:4": {"subsampling": 0},
    "progressive": {"subsampling": 2, "progressive": True},
    "gray": {},
}


def photograph(width: int, height: int, kind: str) -> bytes:
    """A JPEG file of about two bits a pixel; above its own size the photograph is repeated, mirrored, so that detail stays."""
    image = Image.fromarray(skimage.data.coffee())
    if width <= 640:
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    else:
        tile = np.asarray(image)
        pair = np.concatenate([tile, tile[:, ::-1]], axis=1)
        block = np.concatenate([pair, pair[::-1]])
        across, down = -(-width // block.shape[1]), -(-height // block.shape[0])
        image = Image.fromarray(np.tile(block, (down, across, 1))[:height, :width])
    file = io.BytesIO()
    (image.convert("L") if kind == "gray" else image).save(file, "JPEG", quality=88, **KINDS[kind])
    return file.getvalue()


def with_pillow(data: bytes) -> Image.Image:
    """The whole picture by Pillow, as `Image.open` has it."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


# What users have in their own code, on one thread as we are.
TRANSFORMS = torchvision.transforms.Compose(
    [
        torchvision.transforms.Resize(256),
        torchvision.transforms.CenterCrop(224),
        torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize(RECIPE.mean, RECIPE.std),
    ]
)


def with_torchvision(data: bytes) -> torch.Tensor:
    """The whole picture by torchvision, (3 h w) uint8."""
    with warnings.catch_warnings():
        # Its decoder is deprecated, and takes only memory that it could write to.
        warnings.simplefilter("ignore")
        return torchvision.io.decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), torchvision.io.ImageReadMode.RGB)


def by_torchvision(data: bytes) -> np.ndarray:
    """The model's input with torchvision as the decoder and everything else as the stage has it."""
    pixels = with_torchvision(data).permute(1, 2, 0).contiguous().numpy()
    height, width, _ = pixels.shape
    box = (0.0, 0.0, float(width), float(height))
    return sample(Image.fromarray(pixels), box, place(RECIPE, width, height), RECIPE)


def medians(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of processor time of each variant; they take turns, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            started = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_decoding(size: tuple[int, int], kind: str):
    """The stage, with all its checks, costs at most 1.1 of the usual way: Pillow's open and torchvision's transforms."""
    data = photograph(*size, kind)
    payload = EncodedImage(data=data)
    picture = with_pillow(data)
    placement = place(RECIPE, *size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = medians(
            {
                "camserve": lambda: decode(payload, RECIPE, LIMITS, keep_source=False).tensor,
                "torchvision's transforms": lambda: TRANSFORMS(Image.open(io.BytesIO(data)).convert("RGB")),
                "header": lambda: read_header(data),
                "Pillow's decoder": lambda: with_pillow(data),
                "Pillow's resize": lambda: picture.resize(
                    (placement.width, placement.height), Image.Resampling.BILINEAR
                ),
                "torchvision's decoder": lambda: with_torchvision(data),
                "camserve with it": lambda: by_torchvision(data),
            },
            SIZES[size],
        )
    finally:
        torch.set_num_threads(threads)

    print(f"\ndecoding {size[0]} x {size[1]} {kind}: {len(data) / 1000:.0f} kB, one thread")  # noqa: T201 - the point of a benchmark
    for name, seconds in measured.items():
        print(f"  {name:26s} {seconds * 1e3:8.2f} ms   {seconds / measured['camserve']:5.2f} x")  # noqa: T201
    assert measured["camserve"] <= 1.1 * measured["torchvision's transforms"]
