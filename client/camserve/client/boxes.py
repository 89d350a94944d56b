"""Rectangles on the source image, and what was found in them: objects by a detector, strong evidence in a map.

Targets and options send `Box`es; predictions, heatmaps and regions bring them back.
"""

from __future__ import annotations

import dataclasses

from camserve.v1 import heatmap_pb2, input_pb2


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of the source image, in pixels; the far edges are outside it.

    Attributes:
        left: first column.
        top: first row.
        width: columns.
        height: rows.
    """

    left: int
    top: int
    width: int
    height: int

    def to_proto(self) -> input_pb2.Box:
        """Returns the message that names this box."""
        return input_pb2.Box(
            left_pixels=self.left, top_pixels=self.top, width_pixels=self.width, height_pixels=self.height
        )

    @classmethod
    def from_proto(cls, message: input_pb2.Box) -> Box:
        """Returns the box a message names."""
        return cls(message.left_pixels, message.top_pixels, message.width_pixels, message.height_pixels)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """One object a detector found.

    Attributes:
        box: where, in source pixels.
        class_index: its class.
        label: the class's label; empty when the model card has none.
        score: the detector's score.
    """

    box: Box
    class_index: int
    label: str
    score: float

    @property
    def name(self) -> str:
        """The label, or the class index where there is none."""
        return self.label or str(self.class_index)

    @classmethod
    def from_proto(cls, message: heatmap_pb2.Detection) -> Detection:
        """Returns the detection a message holds."""
        return cls(
            box=Box.from_proto(message.box),
            class_index=message.class_index,
            label=message.label,
            score=message.score,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeatRegion:
    """A connected part of a map where the evidence is strong.

    Attributes:
        box: where, in source pixels; in cells of the map where there is no source image.
        peak: largest value in it.
        share: of the map's positive total that lies in it, 0 to 1.
    """

    box: Box
    peak: float
    share: float

    @classmethod
    def from_proto(cls, message: heatmap_pb2.HeatRegion) -> HeatRegion:
        """Returns the region a message holds."""
        return cls(box=Box.from_proto(message.box), peak=message.peak, share=message.share)
