"""Evidence made up for methods under test, and the maps they draw of it."""

from __future__ import annotations

import torch
from torch import Tensor

from camserve.server.cam.methods import METHODS, Evidence, Layerwise, Whole
from camserve.server.jobs import Parameters, Profile

LAYERWISE = [slug for slug, method in METHODS.items() if isinstance(method.arithmetic, Layerwise)]


def random_pair(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """An activation as a ReLU leaves it, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    activation = torch.randn(shape, generator=generator, dtype=torch.float64).clamp_min(0)
    return activation.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def evidence_of(activation: Tensor, gradient: Tensor, parameters: Parameters | None = None) -> Evidence:
    """All that a layer may be asked for; the gradient's first cells stand in for a head, its opposite for curvature."""
    return Evidence(
        activation=activation,
        gradient=gradient,
        class_weight=gradient.flatten(2)[:, :, 0],
        curvature=-gradient,
        parameters=parameters or Parameters(),
    )


def layer_map(slug: str, evidence: Evidence, profile: Profile = Profile.PAPER) -> Tensor:
    """The raw map (b *space) of one layer."""
    arithmetic = METHODS[slug].under(profile)
    assert isinstance(arithmetic, Layerwise)
    return arithmetic.gather(arithmetic.weigh(evidence))


def whole_map(slug: str, *evidences: Evidence, profile: Profile = Profile.PAPER) -> Tensor:
    """The raw map of everything at once."""
    arithmetic = METHODS[slug].under(profile)
    assert isinstance(arithmetic, Whole)
    return arithmetic.draw(evidences)
