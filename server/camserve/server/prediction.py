"""Logits of one row to the prediction a caller sees; a pure function used by the pipeline."""

from __future__ import annotations

import numpy as np

from camserve.server.jobs import ClassScore, FloatArray, Prediction
from camserve.server.models.card import ModelCard

__all__ = ["predict"]


def predict(logits: FloatArray, card: ModelCard, top_k: int) -> Prediction:
    """The `top_k` best classes with their softmax probabilities, best first, ties by lower index.

    Args:
        logits: (classes), finite.
        card: for the labels.
        top_k: at most the number of classes.
    """
    wide = logits.astype(np.float64)
    exponentials = np.exp(wide - wide.max())
    probabilities = exponentials / exponentials.sum()
    best = np.argsort(-wide, kind="stable")[:top_k]
    return Prediction(
        classes=tuple(
            ClassScore(
                class_index=int(index),
                label=card.label(int(index)),
                logit=float(logits[index]),
                probability=float(probabilities[index]),
            )
            for index in best
        )
    )
