"""How a model wants its input made: the `[input]` part of a model card, checked once and then only read.

Loaders make an `InputRecipe` from a card; `preprocess.py` follows it for images and frames, `tensors.py` checks tensors against
it. The order is fixed: convert to RGB or gray, resize and place, `(pixel * scale - mean) / std`, channel order, dtype.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypeAlias, get_args

__all__ = ["Channels", "InputRecipe", "Interpolation", "Resize"]

Resize: TypeAlias = Literal["stretch", "crop", "letterbox", "none"]
Interpolation: TypeAlias = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Channels: TypeAlias = Literal["rgb", "bgr", "gray", "none"]
ElementType: TypeAlias = Literal["float32", "float16", "float64", "uint8"]

_CHANNEL_COUNTS = {"rgb": 3, "bgr": 3, "gray": 1}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InputRecipe:
    """What one row of the model's input is and how an image becomes one.

    Attributes:
        shape: of one row: (c h w) for models that take images; any rank for those that take tensors only.
        dtype: element type of the row as it is handed to the model's batch.
        resize: `stretch` to the shape, ignoring the aspect ratio; `crop` the centre after bringing the shorter side to
            `resize_size`; `letterbox`: fit whole, centred, the rest filled with `pad_value`; `none`: images keep their size.
        resize_size: pixels of the shorter side before a crop; None means the smallest size that covers the shape.
        interpolation: Pillow's filter of that name. All but `nearest` average over the source pixels when shrinking
            (antialias), as Pillow and torchvision do on PIL images.
        scale: multiplies pixel values 0 to 255.
        mean: subtracted then, one value a channel in the model's channel order, or one for all.
        std: divided by then, likewise.
        channels: colour order; `none` for models whose input is not an image: they are sent tensors.
        pad_value: 0 to 255, fills what a letterbox, or a crop larger than the resized image, leaves open.
        is_variable: whether inputs may have other sizes of space than the shape, which is then that of the look at load. Tensors
            may have any; images have the shape's unless `resize` is `none`.

    Raises:
        ValueError: a value that makes no sense; the message says what is allowed.
    """

    shape: tuple[int, ...]
    dtype: ElementType = "float32"
    resize: Resize = "stretch"
    resize_size: int | None = None
    interpolation: Interpolation = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: Channels = "rgb"
    pad_value: int = 0
    is_variable: bool = False

    def __post_init__(self) -> None:
        # Cards are TOML, which gives lists.
        for name in ("shape", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check_choice("dtype", self.dtype, get_args(ElementType))
        _check_choice("resize", self.resize, get_args(Resize))
        _check_choice("interpolation", self.interpolation, get_args(Interpolation))
        _check_choice("channels", self.channels, get_args(Channels))
        if not self.shape or any(not isinstance(size, int) or size < 1 for size in self.shape):
            raise ValueError(f"shape {self.shape} must list at least one size, each an integer of 1 or more")
        if self.is_variable and len(self.shape) < 2:
            raise ValueError(f"an input of shape {self.shape} has no axis of space that could vary; leave variable out")
        if self.resize == "none" and not self.is_variable:
            raise ValueError(
                "resize 'none' gives rows of the images' own sizes; set variable = true if the model takes them"
            )
        if self.takes_images:
            self._check_image()

    def _check_image(self) -> None:
        expected = _CHANNEL_COUNTS[self.channels]
        if len(self.shape) != 3 or self.shape[0] != expected:
            raise ValueError(
                f"shape {self.shape} does not fit channels '{self.channels}', which takes ({expected}, height, width); "
                "a model that takes no images has channels 'none'"
            )
        self._check_resizing()
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, expected) or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} {values} must be one finite number, or {expected}: one for each channel")
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std {self.std} must be above 0")
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale {self.scale} must be finite and not 0; 0.00392156862745098 maps 255 to 1")
        if self.dtype == "uint8" and not (self.scale == 1 and set(self.mean) == {0.0} and set(self.std) == {1.0}):
            raise ValueError("dtype 'uint8' takes pixels as they are: scale must be 1, mean 0 and std 1")

    def _check_resizing(self) -> None:
        if self.resize_size is not None:
            if self.resize != "crop":
                raise ValueError(f"resize_size belongs to resize 'crop', not '{self.resize}'; leave it out")
            if not isinstance(self.resize_size, int) or self.resize_size < 1:
                raise ValueError(f"resize_size {self.resize_size} must be an integer of 1 or more")
        if not isinstance(self.pad_value, int) or not 0 <= self.pad_value <= 255:
            raise ValueError(f"pad_value {self.pad_value} must be an integer from 0 to 255")

    @property
    def takes_images(self) -> bool:
        """Whether images and frames can be made into this input; tensors always can be sent."""
        return self.channels != "none"

    def for_source(self, width: int, height: int) -> InputRecipe:
        """The recipe of an image of this size: itself, or one of the image's own shape where images are not resized."""
        if self.resize != "none":
            return self
        return dataclasses.replace(self, shape=(self.shape[0], height, width), resize="stretch")

    @classmethod
    def imagenet(cls, size: int = 224, resize_size: int = 256) -> InputRecipe:
        """The usual torchvision preset: shorter side to `resize_size`, centre crop, ImageNet mean and standard deviation."""
        return cls(
            shape=(3, size, size),
            resize="crop",
            resize_size=resize_size,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} '{value}' is unknown; allowed: {', '.join(allowed)}")
