"""Models that repeat what they were shown: each answer tells whose input it was made from, in the prediction and in every map.

`MeanColour` over a plain colour gives that colour as its three logits; a map about one of them is that number times a factor
known on paper. A caller who sends a number written as a colour can thus see in whatever arrives whether it is its own.
"""

from __future__ import annotations

import enum
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from support.nets import MeanColour

from camserve.client import Spec
from camserve.v1 import explanation_service_pb2 as service_pb2
from camserve.v1 import input_pb2

__all__ = ["MODELS", "Kind", "foreign", "is_complete", "request", "write_repository"]

MODELS = ("scripted", "hooked")
"""A TorchScript archive, whose graph is rewritten, and a torch.export archive, on whose modules hooks are put."""

_SIDE = 8
_SOURCE_SIDE = 800
_DIGITS = 32
# Apart by far more than float16 or an 8-bit colour can blur.
_DARKEST, _STEP, _WHITE = 20, 7, 255
_CLOSE = 0.01
_CARD = f"[input]\nsize = [{_SIDE}, {_SIDE}]\nmean = [0, 0, 0]\nstd = [1, 1, 1]\n"


class Kind(enum.StrEnum):
    """What is asked."""

    SMALL = "small"
    """A tensor, three maps of one pass."""
    IMAGE = "image"
    """The same of a PNG file that takes a while to decode."""
    AMPLIFIED = "amplified"
    """One map of the pass, two that need many forwards or gradients and so are made in chunks."""


_PASS = (Spec("grad-cam", target=0), Spec("hirescam", target=1), Spec("layercam", target=2))
_CHUNKS = (
    Spec("grad-cam", target=0),
    Spec("occlusion", target=1, window=2, stride=1),
    Spec("integrated-gradients", target=2, steps=64, saliency="gray"),
)
_SPECS = {Kind.SMALL: _PASS, Kind.IMAGE: _PASS, Kind.AMPLIFIED: _CHUNKS}
_MESSAGES = {kind: [spec.to_proto() for spec in specs] for kind, specs in _SPECS.items()}
# Value of a map where the logit is 1: each cell's part of a mean over all, or of the four that a patch hides.
_FACTORS = {"occlusion": 4 / _SIDE**2}


def write_repository(folder: Path, models: Sequence[str] = MODELS) -> Path:
    """Writes these models as `camserve serve --models` reads them; returns the folder."""
    for name in models:
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "model.toml").write_text(_CARD, encoding="utf-8")
        _WRITERS[name](folder / name / "1")
    return folder


def _write_script(folder: Path) -> None:
    torch.jit.save(torch.jit.script(MeanColour().eval()), str(folder / "model.pt"))


def _write_export(folder: Path) -> None:
    example = torch.zeros(2, 3, _SIDE, _SIDE)
    exported = torch.export.export(
        MeanColour().eval(), (example,), dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=64)},)
    )
    torch.export.save(exported, folder / "model.pt2")


_WRITERS = {"scripted": _write_script, "hooked": _write_export}


def request(number: int, kind: Kind, model: str) -> service_pb2.ExplainRequest:
    """Asks about the colour that stands for a number."""
    asked = service_pb2.ExplainRequest(model=model, request_id=str(number), specs=_MESSAGES[kind], top_k=3)
    colour = _colour(number)
    if kind is Kind.IMAGE:
        asked.image.data = _png(colour)
    else:
        values = np.empty((3, _SIDE, _SIDE), "<f4")
        values[:] = (np.array(colour) / _WHITE)[:, None, None]
        asked.tensor.CopyFrom(
            input_pb2.Tensor(data_type=input_pb2.DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes())
        )
    return asked


def is_complete(messages: Sequence[service_pb2.ExplainResponse]) -> bool:
    """Whether these are a whole answer: prediction, a map for each spec, summary."""
    return ["prediction", "heatmap", "heatmap", "heatmap", "summary"] == [
        message.WhichOneof("event") or "" for message in messages
    ]


def foreign(number: int, kind: Kind, messages: Sequence[service_pb2.ExplainResponse]) -> list[str]:
    """What in an answer, whole or not, is of another number; nothing if all of it is this one's."""
    expected = [level / _WHITE for level in _colour(number)]
    told = []
    for message in messages:
        match message.WhichOneof("event"):
            case "prediction":
                logits = {score.class_index: score.logit for score in message.prediction.classes}
                if len(logits) != 3 or any(abs(logits[place] - expected[place]) > _CLOSE for place in logits):
                    told.append(f"{number}: logits {logits} instead of {expected}")
            case "heatmap":
                spec = _SPECS[kind][message.heatmap.spec_index]
                value = expected[spec.target] * _FACTORS.get(spec.method, 1 / _SIDE**2)
                if not math.isclose(message.heatmap.raw_max, value, rel_tol=_CLOSE):
                    told.append(f"{number}: {spec.method} {message.heatmap.raw_max} instead of {value}")
            case "summary":
                if message.summary.request_id != str(number):
                    told.append(f"{number}: the summary is of request {message.summary.request_id}")
            case other:
                told.append(f"{number}: {other}")
    return told


def _colour(number: int) -> list[int]:
    digits = [number // _DIGITS**place % _DIGITS for place in range(3)]
    return [_DARKEST + _STEP * digit for digit in digits]


def _png(colour: Sequence[int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (_SOURCE_SIDE, _SOURCE_SIDE), tuple(colour)).save(file, "PNG", compress_level=1)
    return file.getvalue()
