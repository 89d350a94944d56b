"""The outputs that hold what a model said: their names and shapes by kind of model, and their values for a batch.

For metadata, requests and answers, so that what is advertised is what can be asked for and what comes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from camserve.server.errors import ExecutionFailed, Reason
from camserve.server.jobs import OutputKind, Prediction, Reading
from camserve.server.models.card import ModelCard

__all__ = ["PREDICTIONS", "PredictedOutput", "ranked", "takes_ranking"]

_Values: TypeAlias = Callable[[Sequence[Prediction]], npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class PredictedOutput:
    """One of a model's outputs.

    Attributes:
        datatype: such as FP32.
        sizes: of one row; -1 stands for any.
        values: of a batch, from the predictions of its rows.
    """

    datatype: str
    sizes: Callable[[ModelCard], tuple[int, ...]]
    values: _Values


def reading_of(prediction: Prediction) -> Reading:
    """What the model said before anybody labelled it."""
    if prediction.reading is None:
        raise ExecutionFailed(Reason.INTERNAL, "this is a bug: a prediction came without its reading")
    return prediction.reading


def _scores(rows: Sequence[Prediction]) -> npt.NDArray[Any]:
    return np.stack([reading_of(row).scores for row in rows])


def _probabilities(rows: Sequence[Prediction]) -> npt.NDArray[Any]:
    return np.stack([reading_of(row).probabilities for row in rows])


def _padded(rows: Sequence[Prediction], of_one: Callable[[Any], Any], fill: Any) -> npt.NDArray[Any]:
    """(rows, most detections …): a row with fewer is filled up."""
    most = max(len(row.detections) for row in rows)
    filled = [[of_one(found) for found in row.detections] + [fill] * (most - len(row.detections)) for row in rows]
    return np.array(filled)


def _boxes(rows: Sequence[Prediction]) -> npt.NDArray[Any]:
    def sides(found: Any) -> list[float]:
        return [found.box.left, found.box.top, found.box.width, found.box.height]

    return _padded(rows, sides, [0.0] * 4).astype(np.float32).reshape(len(rows), -1, 4)


def _detected_scores(rows: Sequence[Prediction]) -> npt.NDArray[Any]:
    return _padded(rows, lambda found: found.score, 0.0).astype(np.float32)


def _detected_classes(rows: Sequence[Prediction]) -> npt.NDArray[Any]:
    return _padded(rows, lambda found: found.class_index, -1).astype(np.int64)


def _classes(card: ModelCard) -> tuple[int, ...]:
    return (card.class_count,)


def _steps(card: ModelCard) -> tuple[int, ...]:
    return (-1, card.class_count)


def _found(*sizes: int) -> Callable[[ModelCard], tuple[int, ...]]:
    return lambda _card: (-1, *sizes)


def _any(_card: ModelCard) -> tuple[int, ...]:
    return (-1,)


_OF_CLASSES: Final = MappingProxyType(
    {
        "logits": PredictedOutput("FP32", _classes, _scores),
        "probabilities": PredictedOutput("FP32", _classes, _probabilities),
    }
)
PREDICTIONS: Final[Mapping[OutputKind, Mapping[str, PredictedOutput]]] = MappingProxyType(
    {
        OutputKind.CLASSIFICATION: _OF_CLASSES,
        OutputKind.MULTI_LABEL: _OF_CLASSES,
        OutputKind.SEGMENTATION: _OF_CLASSES,
        OutputKind.REGRESSION: MappingProxyType({"values": PredictedOutput("FP32", _classes, _scores)}),
        OutputKind.EMBEDDING: MappingProxyType({"embedding": PredictedOutput("FP32", _any, _scores)}),
        OutputKind.SEQUENCE: MappingProxyType(
            {
                "logits": PredictedOutput("FP32", _steps, _scores),
                "probabilities": PredictedOutput("FP32", _steps, _probabilities),
            }
        ),
        OutputKind.DETECTION: MappingProxyType(
            {
                "boxes": PredictedOutput("FP32", _found(4), _boxes),
                "scores": PredictedOutput("FP32", _found(), _detected_scores),
                "classes": PredictedOutput("INT64", _found(), _detected_classes),
            }
        ),
    }
)


def takes_ranking(kind: OutputKind) -> bool:
    """Whether an output can be asked for as its best classes."""
    return PREDICTIONS[kind] is _OF_CLASSES


def ranked(values: npt.NDArray[Any], count: int, card: ModelCard) -> npt.NDArray[Any]:
    """The best classes of each row as Triton's clients read them: "value:index", and ":label" where the card has labels.

    Args:
        values: (rows, classes).
        count: how many at most.
        card: for the labels.

    Returns:
        (rows, count) of bytes.
    """
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    told = np.empty(order.shape, object)
    for (row, place), index in np.ndenumerate(order):
        label = card.label(int(index))
        told[row, place] = f"{values[row, index]:f}:{index}{f':{label}' if label else ''}".encode()
    return told
