"""One map as the server sent it: its values, its place on the source, its picture.

`results.py` makes a `Heatmap` from each heatmap message. The payload is checked and decoded when the values are first looked at,
so that a map that nobody looks at costs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from camserve.client import decoding, overlays, words
from camserve.client.geometry import Geometry, resize
from camserve.client.inputs import AnyInput, PreparedInput, prepare
from camserve.v1 import heatmap_pb2

FloatArray: TypeAlias = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedTarget:
    """The class a map turned out to be about.

    Attributes:
        class_index: index into the model's outputs.
        label: its label; empty when the model card has none.
        score: "logit" or "softmax": the number of the class that was differentiated.
        value: that number.
    """

    class_index: int
    label: str
    score: str
    value: float

    @property
    def name(self) -> str:
        """The label, or the class index where there is none."""
        return self.label or str(self.class_index)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Heatmap:
    """One map.

    Attributes:
        spec_index: index of its spec in the request.
        target_index: place among the maps of that spec, from 0.
        target_count: how many maps that spec gives.
        target: the class it is about.
        method: such as "grad-cam".
        profile: whose conventions were followed.
        layers: the layers it was made from.
        flags: what to know before trusting it: "empty", "constant", "negative-only", "non-finite", "partial".
        encoding: how it travelled, such as "uint8".
        raw_min: smallest value after rectification and before normalisation.
        raw_max: largest such value.
        raw_sha256: SHA-256, hexadecimal, of the map as little-endian float32 at layer resolution.
        geometry: how it lies on the source; None for tensors.
    """

    spec_index: int
    target_index: int
    target_count: int
    target: ResolvedTarget
    method: str
    profile: str
    layers: tuple[str, ...]
    flags: frozenset[str]
    encoding: str
    raw_min: float
    raw_max: float
    raw_sha256: str
    geometry: Geometry | None
    _message: heatmap_pb2.Heatmap = dataclasses.field(repr=False)
    _source: PreparedInput | None = dataclasses.field(repr=False, default=None)

    @property
    def is_overlay(self) -> bool:
        """Whether the server sent a finished picture, which has no values."""
        return self._message.encoding in decoding.OVERLAYS

    @property
    def height(self) -> int:
        """Rows of the map."""
        return self._message.shape[0]

    @property
    def width(self) -> int:
        """Columns of the map."""
        return self._message.shape[1]

    @functools.cached_property
    def values(self) -> FloatArray:
        """The map: read-only float32 (h, w), in units of the target's score unless normalisation was asked for.

        Raises:
            CorruptPayload: when the bytes are not what their digest says.
            ValueError: when the map was asked for as an overlay.
        """
        values = decoding.decode_map(self._message)
        values.flags.writeable = False
        return values

    def resized(self, height: int, width: int) -> FloatArray:
        """Returns the map at another resolution: float32 (height, width), bilinear."""
        return resize(self.values, height, width)

    def on_source(self) -> FloatArray:
        """Returns the map on the source's pixels: float32 (H, W), as the server's size "source" would give.

        Raises:
            ValueError: when the input was a tensor, which has no source.
        """
        if self.geometry is None:
            raise ValueError("a tensor has no source to lie on; use resized(height, width)")
        return self.geometry.place(self.values)

    def overlay(self, image: AnyInput | None = None, *, opacity: float = 0.5, colormap: str = "turbo") -> Image.Image:
        """Returns the source with the map's colours over it, as an RGB picture of the source's size.

        Args:
            image: the source; None uses the one that was sent. For a tensor, any picture.
            opacity: weight of the colours where the map is largest, 0 to 1; it falls to 0 where the map is smallest.
            colormap: "turbo", "viridis", "inferno" or "gray".

        Raises:
            ValueError: when there is no picture to lay the map over, or it is not the source's size.
        """
        if self.is_overlay:
            return decoding.decode_overlay(self._message)
        picture = _picture(prepare(image) if image is not None else self._source)
        if self.geometry is None:
            placed = self.resized(picture.height, picture.width)
        else:
            expected = (self.geometry.source_width, self.geometry.source_height)
            if picture.size != expected:
                raise ValueError(
                    f"the map belongs to a source of {expected[0]} x {expected[1]} pixels, this picture has "
                    f"{picture.width} x {picture.height}"
                )
            placed = self.on_source()
        return overlays.blend(picture, placed, opacity=opacity, colormap=colormap)

    def save_overlay(
        self,
        path: str | os.PathLike[str],
        image: AnyInput | None = None,
        *,
        opacity: float = 0.5,
        colormap: str = "turbo",
    ) -> Path:
        """Writes the overlay to a file, in the format its suffix names, and returns the path."""
        self.overlay(image, opacity=opacity, colormap=colormap).save(path)
        return Path(path)


def heatmap_from_proto(message: heatmap_pb2.Heatmap, source: PreparedInput | None = None) -> Heatmap:
    """Returns the map of a message; `source` is what was sent, for overlays."""
    return Heatmap(
        spec_index=message.spec_index,
        target_index=message.target_index,
        target_count=message.target_count,
        target=ResolvedTarget(
            class_index=message.target.class_index,
            label=message.target.label,
            score=words.SCORES.word(message.target.score),
            value=message.target.value,
        ),
        method=words.METHODS.word(message.method),
        profile=words.PROFILES.word(message.profile),
        layers=tuple(message.layers),
        flags=frozenset(words.FLAGS.word(flag) for flag in message.flags),
        encoding=words.ENCODINGS.word(message.encoding),
        raw_min=message.raw_min,
        raw_max=message.raw_max,
        raw_sha256=message.raw_sha256.hex(),
        geometry=Geometry.from_proto(message.geometry) if message.HasField("geometry") else None,
        _message=message,
        _source=source,
    )


def _picture(source: PreparedInput | None) -> Image.Image:
    if source is None or source.picture is None:
        raise ValueError("there is no picture to lay the map over; pass one: overlay(image)")
    picture = source.picture()
    # 16-bit gray would be cut off at 255 by a plain conversion to RGB.
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture
