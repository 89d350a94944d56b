"""Deep feature factorisation: the few patterns of channels that a layer's cells are made of, and where each is found.

Called by `engine/` through the table below; needs nothing but the activation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.cam.methods.budget import at_least_one
from camserve.server.cam.methods.method import Amplified, Family, Method, Scene, Step, WorkClass
from camserve.server.cam.methods.numerics import widen
from camserve.server.jobs import Parameters, Profile

__all__ = ["CONCEPTS"]

_CONCEPTS = 5
_ITERATIONS = 200
_ITERATIONS_A_STEP = 10
# Ten iterations that improve the residual by less than this share of it end the search.
_TOLERANCE = 1e-5


def _concepts(parameters: Parameters) -> int:
    return at_least_one(parameters.concepts, _CONCEPTS, name="concepts", method="deep-feature-factorisation")


def _rectified(activation: Float[Tensor, "c cells"]) -> Float[Tensor, "c cells"]:
    return activation.clamp_min(0)


def _raised(activation: Float[Tensor, "c cells"]) -> Float[Tensor, "c cells"]:
    """As pytorch-grad-cam 1.5: each channel less its smallest value."""
    return activation - activation.amin(dim=1, keepdim=True)


def _factorise(scene: Scene, make_positive: Callable[[Tensor], Tensor]) -> Iterator[Step]:
    """Deep feature factorisation (Collins et al., arXiv:1806.10206): A, channels by cells, is W H with W, H >= 0; H are the maps.

    Gives (concepts *space): H's rows, after W's columns were scaled to length 1, the strongest first; `concepts` is 5 unless set.
    Concepts beyond the rank of A are maps of zeros. Negative activations count as 0; the profile pytorch-grad-cam lifts each
    channel by its minimum instead, but starts at random, so that its maps agree with these only where the factors are unique.

    Least squares by hierarchical alternating updates (Cichocki and Phan, 2009) in float64 from the non-negative double SVD
    (Boutsidis and Gallopoulos, 2008), so that nothing is random: at most 200 iterations, ten a step. Activations that are not
    finite make every map NaN.

    Raises:
        InvalidRequest: fewer than one concept.
    """
    concepts = _concepts(scene.parameters)
    activation = widen(scene.activation)[0]
    space = activation.shape[1:]
    matrix = make_positive(activation.flatten(1).double())
    if not bool(matrix.isfinite().all()):
        yield Step(
            done=1, total=1, best=functools.partial(torch.full, (concepts, *space), torch.nan, device=matrix.device)
        )
        return
    # A common factor keeps the squares in range, whatever the layer's scale.
    scale = float(matrix.amax()) or 1.0
    matrix = matrix / scale
    patterns, places = _start(matrix, concepts)
    before = torch.linalg.norm(matrix)
    for done in range(_ITERATIONS_A_STEP, _ITERATIONS + 1, _ITERATIONS_A_STEP):
        for _ in range(_ITERATIONS_A_STEP):
            places = _improve(places, patterns.T @ matrix, patterns.T @ patterns)
            patterns = _improve(patterns.T, places @ matrix.T, places @ places.T).T
        residual = torch.linalg.norm(matrix - patterns @ places)
        is_last = done == _ITERATIONS or bool(before - residual <= _TOLERANCE * before)
        best = functools.partial(_maps, patterns, places, scale, (concepts, *space))
        yield Step(done=_ITERATIONS if is_last else done, total=_ITERATIONS, best=best)
        if is_last:
            return
        before = residual


def _start(matrix: Float[Tensor, "c cells"], concepts: int) -> tuple[Float[Tensor, "c k"], Float[Tensor, "k cells"]]:
    """Of each pair of singular vectors the larger of the positive and the negative halves, whatever the pair's sign."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    left, values, right = left[:, :concepts], values[:concepts], right[:concepts]
    halves = []
    for sign in (1, -1):
        columns, rows = (sign * left).clamp_min(0), (sign * right).clamp_min(0)
        lengths = torch.linalg.norm(columns, dim=0), torch.linalg.norm(rows, dim=1)
        halves.append((columns, rows, *lengths, lengths[0] * lengths[1]))
    is_first = halves[0][4] >= halves[1][4]
    columns = torch.where(is_first, halves[0][0], halves[1][0])
    rows = torch.where(is_first[:, None], halves[0][1], halves[1][1])
    column_length, row_length, strength = (
        torch.where(is_first, halves[0][part], halves[1][part]) for part in (2, 3, 4)
    )
    root = (values * strength).sqrt()
    return (
        columns * (root / torch.where(column_length > 0, column_length, 1)),
        rows * (root / torch.where(row_length > 0, row_length, 1))[:, None],
    )


def _improve(
    factor: Float[Tensor, "k n"], target: Float[Tensor, "k n"], gram: Float[Tensor, "k k"]
) -> Float[Tensor, "k n"]:
    """One sweep: each row set to its non-negative least squares value, given the others."""
    rows = list(factor)
    for index in range(len(rows)):
        size = gram[index, index]
        others = gram[index] @ torch.stack(rows) - size * rows[index]
        better = ((target[index] - others) / torch.where(size > 0, size, 1)).clamp_min(0)
        rows[index] = torch.where(size > 0, better, 0)
    return torch.stack(rows)


def _maps(
    patterns: Float[Tensor, "c k"], places: Float[Tensor, "k cells"], scale: float, shape: tuple[int, ...]
) -> Float[Tensor, "concepts *space"]:
    scaled = places * torch.linalg.norm(patterns, dim=0)[:, None] * scale
    order = torch.sort(torch.linalg.norm(scaled, dim=1), descending=True, stable=True).indices
    maps: Tensor = scaled.new_zeros(shape[0], scaled.shape[1])
    maps[: len(order)] = scaled[order]
    return maps.reshape(shape).float()


CONCEPTS: tuple[Method, ...] = (
    Method(
        slug="deep-feature-factorisation",
        title="Deep feature factorisation",
        paper="Collins et al., Deep Feature Factorization, arXiv:1806.10206: A = W H, both non-negative; the rows of H",
        family=Family.COMPONENTS,
        work=WorkClass.AMPLIFIED,
        cost="one forward and a matrix factorisation",
        arithmetic=Amplified(functools.partial(_factorise, make_positive=_rectified), maps=_concepts),
        has_target=False,
        variants={
            Profile.PYTORCH_GRAD_CAM: Amplified(functools.partial(_factorise, make_positive=_raised), maps=_concepts)
        },
        absent_from=frozenset({Profile.TORCHCAM}),
        parameters=frozenset({"concepts"}),
    ),
)
