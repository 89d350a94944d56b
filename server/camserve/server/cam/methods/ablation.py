"""Ablation-CAM: takes one channel away at a time and weighs it by what the score loses.

Only what lies behind the layer is run again. Called by `engine/` through the table in `perturbation.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from camserve.server.cam.methods.budget import choose_channels, chunks
from camserve.server.cam.methods.method import Amplified, Scene, Step
from camserve.server.cam.methods.numerics import widen

__all__ = ["ABLATION_CAM", "ABLATION_CAM_PYTORCH_GRAD_CAM"]

_METHOD = "ablation-cam"
# pytorch-grad-cam's, of which the first takes the place of zero, and the second makes it grow from row to row.
_FAR_BELOW = 1e7
_LIBRARY_BATCH = 32


def _ablation_cam(scene: Scene) -> Iterator[Step]:
    """Ablation-CAM (WACV 2020, doi:10.1109/WACV45572.2020.9093360): sum_k (y - y_k) / |y| A_k, y_k with channel k set to zero.

    The paper divides by y, which it takes to be positive. A negative y would turn the map's sign, and evidence against a class,
    the same with y negated, would look like evidence for it: hence the magnitude. Where y vanishes beside the drops, within
    float32 rounding, the plain drop y - y_k is the weight: the same but for a factor that all channels share. Channels that are
    zero everywhere have nothing to take away and are not tried. NaN scores make the map NaN. Reads `channels`.
    """
    is_alive = (scene.activation[0] != 0).flatten(1).any(dim=1)
    return _ablate(scene, choose_channels(scene, is_alive, method=_METHOD), _set_to_zero, _share)


def _pytorch_grad_cam(scene: Scene) -> Iterator[Step]:
    """As pytorch-grad-cam 1.5: divides by y as it is; without a zero minimum in the layer, sets channels far below it.

    Its value is the minimum less 1e7, written into a batch of 32 rows one after the other, with the minimum taken anew each time:
    the j-th row of a batch gets the minimum less j times 1e7.
    """
    activation = scene.activation
    low = activation.amin()
    everything = torch.ones(activation.shape[1], dtype=torch.bool, device=activation.device)
    channels = choose_channels(scene, everything, method=_METHOD)

    def values(places: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
        return torch.where(low == 0, 0, low - (places % _LIBRARY_BATCH + 1) * _FAR_BELOW).to(activation.dtype)

    return _ablate(scene, channels, values, _signed_share)


def _set_to_zero(places: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    return torch.zeros(len(places), device=places.device)


def _ablate(
    scene: Scene,
    channels: Int[Tensor, "chosen"],
    values: Callable[[Tensor], Tensor],
    weigh: Callable[[Tensor, float], Tensor],
) -> Iterator[Step]:
    """Yields the map after each chunk of channels.

    Args:
        scene: the row.
        channels: to ablate, in order.
        values: of the places in that order, what the channels are set to.
        weigh: makes weights of the drops and y.
    """
    activation = scene.activation
    if not len(channels):
        yield Step(done=1, total=1, best=functools.partial(torch.zeros_like, widen(activation[0, 0])))
        return
    # By the tail alone, as the tries are: a drop is the small difference of two scores, and other kernels have other last bits.
    # Of a copy, since the model may write into what it is given.
    score = float(scene.tail_scores(activation.clone())[0])
    drops = torch.zeros(0, dtype=torch.float64, device=activation.device)
    # Filled anew for each chunk, since the model may write into what it is given, but allocated once, which takes longer.
    copies = activation.repeat(min(len(channels), scene.tail_chunk_rows), *[1] * (activation.ndim - 1))
    for chunk in chunks(len(channels), scene.tail_chunk_rows):
        places = torch.arange(chunk.start, chunk.stop, device=activation.device)
        ablated = copies[: len(places)].copy_(activation)
        fill = values(places).to(ablated.dtype).reshape(-1, *[1] * (activation.ndim - 2))
        ablated[places - chunk.start, channels[chunk]] = fill
        drops = torch.cat([drops, score - scene.tail_scores(ablated).double()])
        yield Step(
            done=chunk.stop,
            total=len(channels),
            best=functools.partial(_weighted_sum, activation, channels[: chunk.stop], weigh(drops, score)),
        )


def _share(drops: Float[Tensor, "done"], score: float) -> Float[Tensor, "done"]:
    is_lost = abs(score) <= torch.finfo(torch.float32).eps * drops.abs().amax()
    return torch.where(is_lost, drops, drops / abs(score or 1.0))


def _signed_share(drops: Float[Tensor, "done"], score: float) -> Float[Tensor, "done"]:
    return drops / (score or 1.0)


def _weighted_sum(
    activation: Float[Tensor, "1 c *space"], channels: Int[Tensor, "done"], weights: Float[Tensor, "done"]
) -> Float[Tensor, "*space"]:
    channel_values = widen(activation[0, channels])
    total: Tensor = torch.tensordot(weights.to(channel_values.dtype), channel_values, dims=1)
    return total


ABLATION_CAM = Amplified(_ablation_cam)
ABLATION_CAM_PYTORCH_GRAD_CAM = Amplified(_pytorch_grad_cam)
