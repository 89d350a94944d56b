"""What colour alone can tell: a histogram classifier that the demo problem must defeat.

Arrives: pictures and labels to learn from, pictures to judge. Leaves: predicted labels. `train.py` prints its accuracy
beside the model's, and a test holds it below 0.8: were it higher, a heatmap would explain nothing worth knowing.
"""

# ruff: noqa: F722
# jaxtyping writes shapes as strings that are no Python.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from camserve.server.demo.surfaces import LABELS, Surface

__all__ = ["histogram_accuracy", "joint_histogram"]

_BINS = 8


def joint_histogram(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Counts colours in 8 x 8 x 8 boxes.

    Args:
        image: RGB, shape (h, w, 3).

    Returns:
        Square roots of the shares, shape (512,): their dot product is the Bhattacharyya coefficient.
    """
    boxes = (image // (256 // _BINS)).reshape(-1, 3).astype(np.intp) @ np.array([_BINS * _BINS, _BINS, 1])
    return np.sqrt(np.bincount(boxes, minlength=_BINS**3) / len(boxes)).astype(np.float32)


def _regression(features: Float[Tensor, "b d"], labels: Int[Tensor, " b"]) -> Float[Tensor, "d n"]:
    """Fits multinomial logistic regression with a little ridge; the problem is convex, so the start does not matter."""
    weights = torch.zeros(features.shape[1], len(LABELS), requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(features @ weights, labels) + 1e-4 * weights.square().sum()
        value.backward()  # type: ignore[no-untyped-call]  # Untyped upstream.
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]  # Untyped upstream.
    return weights.detach()


def histogram_accuracy(training: Sequence[Surface], test: Sequence[Surface]) -> dict[str, float]:
    """Measures two classifiers that see nothing but the joint colour histogram.

    Args:
        training: pictures to learn from.
        test: pictures to judge.

    Returns:
        Accuracy of `logistic regression` and of `nearest neighbour`.
    """
    seen = torch.from_numpy(np.stack([joint_histogram(s.image) for s in training]))
    asked = torch.from_numpy(np.stack([joint_histogram(s.image) for s in test]))
    known = torch.tensor([s.label for s in training])
    truth = torch.tensor([s.label for s in test])
    regressed = (asked @ _regression(seen, known)).argmax(1)
    nearest = known[(asked @ seen.T).argmax(1)]
    return {
        "logistic regression": (regressed == truth).float().mean().item(),
        "nearest neighbour": (nearest == truth).float().mean().item(),
    }
