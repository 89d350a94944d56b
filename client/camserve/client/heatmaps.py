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
from camserve.client.boxes import HeatRegion
from camserve.client.geometry import Geometry, resize
from camserve.client.inputs import AnyInput, PreparedInput, prepare
from camserve.client.resolved import ResolvedTarget
from camserve.v1 import heatmap_pb2

FloatArray: TypeAlias = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Heatmap:
    """One map.

    Attributes:
        spec_index: index of its spec in the request; of a rule's, counted on behind the request's.
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
        axes: names of the dimensions of `values`: "h", "w"; "t" for signals, "d", "h", "w" for volumes; "c" last for channels.
        regions: boxes around the strongest evidence, strongest first, if the spec asked for them.
        completed: share of an amplified method's work that was done; less than 1 only with the flag "partial".
        rule: name of the model's rule that asked for it; empty for a spec of the request.
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
    axes: tuple[str, ...] = ("h", "w")
    regions: tuple[HeatRegion, ...] = ()
    completed: float = 1.0
    rule: str = ""
    _message: heatmap_pb2.Heatmap = dataclasses.field(repr=False)
    _source: PreparedInput | None = dataclasses.field(repr=False, default=None)

    @property
    def is_overlay(self) -> bool:
        """Whether the server sent a finished picture, which has no values."""
        return self._message.encoding in decoding.OVERLAYS

    @property
    def has_channels(self) -> bool:
        """Whether the last axis of `values` is the input's channels, signed: a map in input space, sent in colour."""
        return not self.is_overlay and self.axes[-1:] == ("c",)

    @property
    def is_flat(self) -> bool:
        """Whether the map has rows and columns; signals and volumes do not."""
        return self.axes[:2] == ("h", "w")

    @property
    def height(self) -> int:
        """Rows of the map; raises ValueError for signals."""
        return self._size("h")

    @property
    def width(self) -> int:
        """Columns of the map; raises ValueError for signals."""
        return self._size("w")

    def _size(self, axis: str) -> int:
        if axis not in self.axes:
            raise ValueError(f"the map's axes are {', '.join(self.axes)}: it has no {axis!r}")
        return self._message.shape[self.axes.index(axis)]

    @functools.cached_property
    def values(self) -> FloatArray:
        """The map: read-only float32 of `axes`, in units of the target's score unless normalisation was asked for.

        Raises:
            CorruptPayload: when the bytes are not what their digest says.
            ValueError: when the map was asked for as an overlay.
        """
        values = decoding.decode_map(self._message)
        values.flags.writeable = False
        return values

    @property
    def strength(self) -> FloatArray:
        """The map without channels, float32 (h, w): the values, or the magnitudes of signed channels added up.

        Those are clipped at their 99th percentile, as the server's saliency "gray" does.

        Raises:
            ValueError: for a signal or a volume, which is no picture.
        """
        if not self.is_flat:
            raise ValueError(f"a map with the axes {', '.join(self.axes)} is no picture; look at its values")
        if not self.has_channels:
            return self.values
        total = np.abs(self.values).sum(axis=-1)
        return np.asarray(np.minimum(total, np.percentile(total, 99)), np.float32)

    def resized(self, height: int, width: int) -> FloatArray:
        """Returns the map's strength at another resolution: float32 (height, width), bilinear."""
        return resize(self.strength, height, width)

    def on_source(self) -> FloatArray:
        """Returns the map's strength on the source's pixels: float32 (H, W), as the server's size "source" would give.

        Raises:
            ValueError: when the input was a tensor, which has no source, or the map is no picture.
        """
        if self.geometry is None:
            raise ValueError("a tensor has no source to lie on; use resized(height, width)")
        return self.geometry.place(self.strength)

    def signed_picture(self) -> Image.Image:
        """Returns the map alone, as an RGB picture of its own size in which 0 is mid-gray.

        Three signed channels become red, green and blue, brighter for evidence for the target and darker for evidence against.
        One channel, or a map without, is red where it is positive and blue where it is negative.
        """
        if not self.is_flat:
            raise ValueError(f"a map with the axes {', '.join(self.axes)} is no picture; look at its values")
        return overlays.signed(self.values)

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
        target=ResolvedTarget.from_proto(message.target),
        method=words.METHODS.word(message.method),
        profile=words.PROFILES.word(message.profile),
        layers=tuple(message.layers),
        flags=frozenset(words.FLAGS.word(flag) for flag in message.flags),
        encoding=words.ENCODINGS.word(message.encoding),
        raw_min=message.raw_min,
        raw_max=message.raw_max,
        raw_sha256=message.raw_sha256.hex(),
        geometry=Geometry.from_proto(message.geometry) if message.HasField("geometry") else None,
        axes=tuple(message.axes),
        regions=tuple(HeatRegion.from_proto(region) for region in message.regions),
        completed=message.completed,
        rule=message.rule,
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
