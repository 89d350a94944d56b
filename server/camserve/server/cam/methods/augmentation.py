"""Calmer maps by trying the method on flipped and scaled copies of the input.

`engine/` wraps a method's arithmetic where a spec asks for augmentation.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods.budget import chunks
from camserve.server.cam.methods.masks import enlarge, ranges, stretch
from camserve.server.cam.methods.method import Amplified, Layerwise, Scene, Step
from camserve.server.jobs import Profile

__all__ = ["augmented"]

_FACTORS = (0.9, 1.0, 1.1)
# Each copy: whether it is flipped, and what its values are multiplied by. The row as it is comes first.
_COPIES = sorted(itertools.product((False, True), _FACTORS), key=lambda copy: (copy[1] != 1, copy[0]))


def augmented(arithmetic: Layerwise) -> Amplified:
    """The mean of a method's maps over six copies of the input, each flipped back: pytorch-grad-cam's `aug_smooth`.

    The copies are the input times 0.9, 1 and 1.1, as it is and mirrored along its last axis. The raw signed maps are averaged,
    in units of the score. Under the profile pytorch-grad-cam each is first rectified and min-max normalised at the input's
    resolution, as there: the map is then that library's before its enlargement, and a map of zeros counts as zeros.

    Args:
        arithmetic: of a method that is computed from one layer, under the spec's profile; components may stand in for its sum.
    """
    return Amplified(functools.partial(_steps, arithmetic))


def _steps(arithmetic: Layerwise, scene: Scene) -> Iterator[Step]:
    inputs = scene.inputs
    total: Tensor | None = None
    for chunk in chunks(len(_COPIES), scene.chunk_rows):
        copies = _COPIES[chunk]
        batch = torch.cat([(inputs.flip(-1) if is_flipped else inputs) * factor for is_flipped, factor in copies])
        maps = arithmetic.gather(arithmetic.weigh(scene.evidence(batch)))
        maps = torch.stack(
            [one.flip(-1) if is_flipped else one for one, (is_flipped, _) in zip(maps, copies, strict=True)]
        )
        if scene.profile is Profile.PYTORCH_GRAD_CAM:
            maps = _normalised(maps, inputs.shape[2:])
        total = maps.sum(dim=0) if total is None else total + maps.sum(dim=0)
        yield Step(done=chunk.stop, total=len(_COPIES), best=functools.partial(torch.div, total, chunk.stop))


def _normalised(maps: Float[Tensor, "n *space"], shape: Sequence[int]) -> Float[Tensor, "n *space"]:
    """Maps that, once enlarged, lie between 0 and 1: enlarging is linear, so that the range found there serves here."""
    positive = stretch(maps.clamp_min(0)[:, None])
    low, high, is_constant = ranges(enlarge(positive, shape))
    return ((positive - low) / torch.where(is_constant, 1, high - low))[:, 0]
