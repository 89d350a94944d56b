"""How good the demo model is: accuracy, and how often its maps point at the flaw.

Arrives: a model and surfaces. Leaves: `Figures`. `train.py` prints them and tests compare them with the published ones.
The two CAM methods are written out here in plain autograd, on purpose apart from the server's own, so that the figures
judge the server rather than repeat it.
"""

# ruff: noqa: F722
# jaxtyping writes shapes as strings that are no Python.

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from camserve.server.demo.network import MEAN, STD, front, tail
from camserve.server.demo.pointing import chance, pointing_hit
from camserve.server.demo.surfaces import LABELS, Surface

__all__ = ["Figures", "evaluate", "layer4_maps", "normalised"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured.

    Attributes:
        count: pictures judged.
        accuracy: share of right predictions.
        confusion: pictures per true (row) and predicted (column) class.
        pointing: hit rate over all flawed pictures, right or wrong, for the predicted class's map, by method.
        chance: hit rate of pointing at random.
    """

    count: int
    accuracy: float
    confusion: list[list[int]]
    pointing: dict[str, float]
    chance: float


def normalised(surfaces: Sequence[Surface]) -> Float[Tensor, "b 3 h w"]:
    """Turns pictures into model input exactly as the model card tells the server to."""
    images = torch.from_numpy(np.stack([surface.image for surface in surfaces])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def layer4_maps(
    model: nn.Module, inputs: Float[Tensor, "b 3 h w"]
) -> tuple[Int[Tensor, " b"], dict[str, Float[Tensor, "b i j"]]]:
    """Computes each picture's predicted class and that class's maps at the last stage.

    Args:
        model: a `SurfaceNet` in evaluation mode, scripted or not; its children are called one by one.
        inputs: normalised pictures.

    Returns:
        Predicted classes, and rectified maps by method slug.
    """
    with torch.no_grad():
        activation = front(model, inputs)
    activation.requires_grad_()
    logits = tail(model, activation)
    predicted = logits.argmax(1)
    (gradient,) = torch.autograd.grad(logits.gather(1, predicted[:, None]).sum(), activation)
    weights = gradient.mean((2, 3), keepdim=True)
    with torch.no_grad():
        maps = {
            "grad-cam": (weights * activation).sum(1).relu(),
            "layer-cam": (gradient.relu() * activation).sum(1).relu(),
        }
    return predicted, maps


def _batches(surfaces: Sequence[Surface], rows: int = 50) -> Iterator[Sequence[Surface]]:
    return (surfaces[start : start + rows] for start in range(0, len(surfaces), rows))


def evaluate(model: nn.Module, surfaces: Sequence[Surface]) -> Figures:
    """Measures a model on surfaces.

    Args:
        model: as for `layer4_maps`.
        surfaces: pictures with their truth, at least one of them flawed.
    """
    confusion = np.zeros((len(LABELS), len(LABELS)), dtype=int)
    hits: dict[str, list[bool]] = {}
    for batch in _batches(surfaces):
        predicted, maps = layer4_maps(model, normalised(batch))
        for row, surface in enumerate(batch):
            confusion[surface.label, int(predicted[row])] += 1
            if surface.mask.any():
                for method, values in maps.items():
                    hits.setdefault(method, []).append(pointing_hit(values[row].numpy(), surface.mask))
    flawed = [surface for surface in surfaces if surface.mask.any()]
    return Figures(
        count=len(surfaces),
        accuracy=float(np.trace(confusion) / len(surfaces)),
        confusion=confusion.tolist(),
        pointing={method: float(np.mean(rows)) for method, rows in hits.items()},
        # A hundred masks give the chance level to about a percent.
        chance=float(np.mean([chance(surface.mask) for surface in flawed[:100]])),
    )
