"""The papers' formulas in float64, written a second time and far from the server's: they prove the libraries' answers, and ours.

`witness` runs a network once and keeps what formulas are about; each formula takes it and gives a raw signed map (h w).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from contract.conformance.networks import Question
from torch import Tensor, nn

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Witness:
    """A forward and its gradients at one layer, for one image.

    Attributes:
        score: y.
        activation: A (c h w), as the layer returned it.
        gradient: dy/dA.
        curvature: the Hessian of y at A, times A.
    """

    score: float
    activation: Array
    gradient: Array
    curvature: Array


def doubled(net: nn.Module) -> nn.Module:
    """A copy in float64."""
    return copy.deepcopy(net).double()


def witness(question: Question, weights: Tensor | None = None, *, has_curvature: bool = True) -> Witness:
    """Runs the network in float64, with the layer's output as a leaf that later in-place operations cannot reach.

    Args:
        question: one layer.
        weights: of the logits in y; None takes the target's.
        has_curvature: whether it is wanted; fused attention has none.
    """
    net, kept = doubled(question.net), []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        kept.append(output.detach().clone().requires_grad_())
        return kept[0].clone()

    handle = net.get_submodule(question.layers[0]).register_forward_hook(keep)
    logits = net(question.image.double())[0]
    handle.remove()
    score = logits[question.class_index] if weights is None else (logits * weights).sum()
    (gradient,) = torch.autograd.grad(score, kept, create_graph=has_curvature)
    (curvature,) = (
        torch.autograd.grad(gradient, kept, grad_outputs=kept, allow_unused=True)
        if has_curvature and gradient.requires_grad
        else (None,)
    )
    return Witness(
        score=float(score.detach()),
        activation=kept[0].detach()[0].numpy(),
        gradient=gradient.detach()[0].numpy(),
        curvature=np.zeros_like(kept[0].detach()[0].numpy()) if curvature is None else curvature[0].numpy(),
    )


def tail_score(question: Question, activation: Array) -> float:
    """The score with the layer's output replaced."""
    net = doubled(question.net)
    net.get_submodule(question.layers[0]).register_forward_hook(lambda *_: torch.from_numpy(activation)[None].clone())
    with torch.no_grad():
        return float(net(question.image.double())[0, question.class_index])


def score(question: Question, images: Tensor) -> Array:
    """The scores of other images, (n)."""
    with torch.no_grad():
        return doubled(question.net)(images.double())[:, question.class_index].numpy()


def _weighted(weights: Array, seen: Witness) -> Array:
    return np.einsum("k,kij->ij", weights, seen.activation)


def grad_cam(seen: Witness) -> Array:
    """arXiv:1610.02391, equations 1 and 2."""
    return _weighted(seen.gradient.mean(axis=(1, 2)), seen)


def grad_cam_plus_plus(seen: Witness, epsilon: float = 0.0) -> Array:
    """arXiv:1710.11063, equation 19; pytorch-grad-cam adds 1e-6 to the denominator."""
    squared, cubed = seen.gradient**2, seen.gradient**3
    denominator = 2 * squared + seen.activation.sum(axis=(1, 2), keepdims=True) * cubed + epsilon
    alpha = np.divide(squared, denominator, out=np.zeros_like(squared), where=seen.gradient != 0)
    return _weighted((alpha * np.maximum(seen.gradient, 0)).sum(axis=(1, 2)), seen)


def grad_cam_plus_plus_cubed(seen: Witness) -> Array:
    """What torchcam 0.5.0 computes: sum ReLU(g)^3."""
    return _weighted((np.maximum(seen.gradient, 0) ** 3).sum(axis=(1, 2)), seen)


def xgrad_cam(seen: Witness, epsilon: float = 0.0) -> Array:
    """arXiv:2008.02312: weights sum(g A) / sum(A); libraries add a constant to sum(A)."""
    total = seen.activation.sum(axis=(1, 2)) + epsilon
    product = (seen.gradient * seen.activation).sum(axis=(1, 2))
    # A channel that is zero everywhere contributes nothing, whatever its weight.
    return _weighted(np.divide(product, total, out=np.zeros_like(product), where=total != 0), seen)


def hirescam(seen: Witness) -> Array:
    """arXiv:2011.08891."""
    return (seen.gradient * seen.activation).sum(axis=0)


def layercam(seen: Witness) -> Array:
    """IEEE TIP 30 (2021), doi:10.1109/TIP.2021.3089943."""
    return (np.maximum(seen.gradient, 0) * seen.activation).sum(axis=0)


def elementwise(seen: Witness) -> Array:
    """The sum over channels of ReLU(g A)."""
    return np.maximum(seen.gradient * seen.activation, 0).sum(axis=0)


def component(channels: Array) -> Array:
    """arXiv:2008.00299: the projection of each cell on the first principal component of the cells; its sign is arbitrary."""
    cells = channels.reshape(len(channels), -1).T
    cells = cells - cells.mean(axis=0)
    left, values, _ = np.linalg.svd(cells, full_matrices=False)
    return (left[:, 0] * values[0]).reshape(channels.shape[1:])


def kernel_component(activation: Array) -> Array:
    """arXiv:2410.00267 with the sigmoid kernel tanh(x.y / channels + 1), centred in feature space."""
    cells = activation.reshape(len(activation), -1).T
    cells = cells - cells.mean(axis=0)
    kernel = np.tanh(cells @ cells.T / cells.shape[1] + 1)
    centring = np.eye(len(kernel)) - 1 / len(kernel)
    values, vectors = np.linalg.eigh(centring @ kernel @ centring)
    return (vectors[:, -1] * np.sqrt(values[-1])).reshape(activation.shape[1:])


def seg_eigen_cam(seen: Witness) -> Array:
    """Appl. Sci. 15 (2025) 7562, equations 10 to 13: the component of |g| A, its larger end positive."""
    values = component(np.abs(seen.gradient) * seen.activation)
    return -values if abs(values.min()) > abs(values.max()) else values


def fem(seen: Witness) -> Array:
    """IPTA 2020: cells two standard deviations above their channel's mean count for that mean."""
    mean, deviation = (getattr(seen.activation, name)(axis=(1, 2), keepdims=True) for name in ("mean", "std"))
    return (mean * (seen.activation >= mean + 2 * deviation) * (deviation > 0)).sum(axis=0)


def fem_by_share(seen: Witness) -> Array:
    """What pytorch-grad-cam computes: channels weighed by the share of their cells beyond two standard deviations."""
    mean, deviation = (getattr(seen.activation, name)(axis=(1, 2), keepdims=True) for name in ("mean", "std"))
    return _weighted((seen.activation > mean + 2 * deviation).mean(axis=(1, 2)), seen)


def shapley_cam(seen: Witness) -> Array:
    """arXiv:2501.06261: mean(g - H A / 2)."""
    return _weighted((seen.gradient - seen.curvature / 2).mean(axis=(1, 2)), seen)


def ablation_cam(question: Question, seen: Witness) -> Array:
    """WACV 2020: (y - y without the channel) / y."""
    weights = []
    for channel in range(len(seen.activation)):
        ablated = seen.activation.copy()
        ablated[channel] = 0
        weights.append((seen.score - tail_score(question, ablated)) / seen.score)
    return _weighted(np.array(weights), seen)


def masked(question: Question, seen: Witness, *, aligned: bool, before: bool) -> Tensor:
    """Score-CAM's masks (c 1 h w): channels in [0, 1] at the input's size.

    Args:
        question: for the input.
        seen: for the channels.
        aligned: whether corners are aligned when enlarging.
        before: whether channels are normalised before they are enlarged, or after.
    """
    channels = torch.from_numpy(seen.activation)[:, None]

    def scaled(values: Tensor) -> Tensor:
        low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
        return (values - low) / (high - low + 1e-8)

    size = question.image.shape[2:]
    enlarged = nn.functional.interpolate(
        scaled(channels) if before else channels, size, mode="bilinear", align_corners=aligned
    )
    return enlarged if before else scaled(enlarged)


def score_cam(question: Question, seen: Witness, *, aligned: bool = False, before: bool = False) -> Array:
    """arXiv:1910.01279, algorithm 1: softmax over channels of the masked scores; a common baseline cancels."""
    scores = score(question, masked(question, seen, aligned=aligned, before=before) * question.image.double())
    return _weighted(_softmax(scores, np.ones(len(scores), dtype=bool)), seen)


def _softmax(scores: Array, among: npt.NDArray[np.bool_]) -> Array:
    weights = np.where(among, np.exp(scores - scores[among].max()), 0)
    return weights / weights.sum()


def varied(seen: Witness) -> npt.NDArray[np.bool_]:
    """Channels with more than one value: the official code of Score-CAM leaves out the others, which mark nothing (c)."""
    return np.ptp(seen.activation, axis=(1, 2)) > 0


def score_cam_of_varied(question: Question, seen: Witness, coefficients: Sequence[float] = (1.0,)) -> Array:
    """Score-CAM as its official code has it, and IS-CAM (arXiv:2010.03023) for several coefficients of the masks."""
    masks = masked(question, seen, aligned=False, before=False) * question.image.double()
    mean = np.mean([score(question, masks * coefficient) for coefficient in coefficients], axis=0)
    return _weighted(_softmax(mean, varied(seen)), seen)


def input_gradient(question: Question) -> Array:
    """dy/dx (3 h w)."""
    image = question.image.double().requires_grad_()
    doubled(question.net)(image)[0, question.class_index].backward()
    assert image.grad is not None
    return image.grad[0].numpy()


class _Guided(torch.autograd.Function):
    """Guided backpropagation's ReLU (arXiv:1412.6806)."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        context.save_for_backward(values)
        return values.clamp_min(0)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (values,) = context.saved_tensors
        return gradient.clamp_min(0) * (values > 0)


class _Deconvnet(torch.autograd.Function):
    """The deconvnet's ReLU (arXiv:1311.2901)."""

    @staticmethod
    def forward(_context: Any, values: Tensor) -> Tensor:
        return values.clamp_min(0)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp_min(0)


class _Gate(torch.overrides.TorchFunctionMode):
    """Puts another function in the place of every ReLU that is called, by whatever name."""

    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._relu = relu

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called in place of every function on tensors."""
        if function in {torch.relu, torch.relu_, nn.functional.relu, Tensor.relu, Tensor.relu_}:
            return self._relu(args[0].clone())
        return function(*args, **(kwargs or {}))


def guided_gradient(question: Question, *, seen_by: Literal["modules", "everything"], rule: str = "guided") -> Array:
    """The input's gradient (3 h w) with ReLUs gated, those that are modules or all of them."""
    relu = {"guided": _Guided, "deconvnet": _Deconvnet}[rule].apply
    net, image = doubled(question.net), question.image.double().requires_grad_()
    if seen_by == "modules":
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.forward = lambda values: relu(values.clone())  # type: ignore[method-assign]
        logits = net(image)
    else:
        with _Gate(relu):
            logits = net(image)
    logits[0, question.class_index].backward()
    assert image.grad is not None
    return image.grad[0].numpy()


def smooth_grad_cam_plus_plus(noisy: Sequence[Witness], clean: Witness, *, shown: Witness) -> Array:
    """As torchcam has it: alpha from mean g^2 and g^3 with g^3 inside the sum over A, ReLU of the last g, on `shown`'s A."""
    squared, cubed = (np.mean([seen.gradient**power for seen in noisy], axis=0) for power in (2, 3))
    alpha = squared / (2 * squared + (cubed * clean.activation).sum(axis=(1, 2), keepdims=True) + 1e-8)
    return _weighted((alpha * np.maximum(noisy[-1].gradient, 0)).sum(axis=(1, 2)), shown)


def integrated_score_cam(question: Question, seen: Witness, coefficients: Array) -> Array:
    """IS-CAM with torchcam's masks: softmax over all channels of the mean score of masked inputs times each coefficient."""
    masks = masked(question, seen, aligned=False, before=True) * question.image.double()
    mean = np.mean([score(question, masks * coefficient) for coefficient in coefficients], axis=0)
    return _weighted(_softmax(mean, np.ones(len(mean), dtype=bool)), seen)


def smooth_grad_cam_plus_plus_averaged(noisy: Sequence[Witness], clean: Witness) -> Array:
    """arXiv:1908.01224: Grad-CAM++ with g, g^2 and g^3 averaged over noisy copies, on the clean input's A."""
    mean, squared, cubed = (np.mean([seen.gradient**power for seen in noisy], axis=0) for power in (1, 2, 3))
    denominator = 2 * squared + clean.activation.sum(axis=(1, 2), keepdims=True) * cubed
    alpha = np.divide(squared, denominator, out=np.zeros_like(squared), where=squared != 0)
    return _weighted((alpha * np.maximum(mean, 0)).sum(axis=(1, 2)), clean)


def rounding(method: str, seen: Witness) -> float:
    """What float32 leaves open in a map whose channels cancel, as a share of its peak: epsilon times what is summed.

    Grad-CAM's relatives sum channels weighed by sums of gradients; XGrad-CAM also divides by sums of A, which may be near zero:
    over n cells, each sum is off by up to n epsilon of what is summed.
    """
    gradient, activation = np.abs(seen.gradient), np.abs(seen.activation)
    match method:
        case "hirescam":
            parts, made = gradient * activation, hirescam(seen)
        case "xgrad-cam":
            total = np.abs(seen.activation.sum(axis=(1, 2)))
            total = np.where(total > 0, total, np.inf)  # A dead channel adds nothing.
            weight = np.abs((seen.gradient * seen.activation).sum(axis=(1, 2)))
            summed = (gradient * activation).sum(axis=(1, 2)) + weight / total * activation.sum(axis=(1, 2))
            parts, made = activation[0].size * (summed / total)[:, None, None] * activation, xgrad_cam(seen)
        case _:
            parts, made = gradient.mean(axis=(1, 2), keepdims=True) * activation, grad_cam(seen)
    return float(np.finfo(np.float32).eps * parts.sum(axis=0).max() / np.abs(made).max())
