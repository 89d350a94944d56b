"""Networks at the edges of what CAMs are defined for, and their activations and gradients by plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Centred", "Dense", "Shared", "centred", "dense", "evidence", "functional_in_place", "in_place", "shared"]


def _seeded(module: nn.Module, seed: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for child in module.modules():
            if isinstance(child, nn.Conv2d | nn.Linear):
                child.reset_parameters()
    return module.eval()


class Shared(nn.Module):
    """One ReLU called twice, and one block called three times over."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b 4)."""
        x = self.relu(self.stem(x))
        for _ in range(3):
            x = self.block(x) + x
        scores: Tensor = self.head(self.relu(x).mean((2, 3)))
        return scores


class InPlace(nn.Module):
    """An in-place ReLU module right behind the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b 4)."""
        x = self.relu(self.body(x))
        scores: Tensor = self.head(torch.tanh(self.last(x)).mean((2, 3)))
        return scores


class FunctionalInPlace(InPlace):
    """The same with a function that writes into its argument."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b 4)."""
        x = torch.relu_(self.body(x))
        scores: Tensor = self.head(torch.tanh(self.last(x)).mean((2, 3)))
        return scores


class Dense(InPlace):
    """A dense block: the convolution's output is concatenated with its input, normalised, and then rectified in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(11)
        self.pool = nn.AvgPool2d(2)
        self.last = nn.Conv2d(11, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b 4)."""
        features = self.body(x)
        joined = torch.cat([self.pool(x), features], dim=1)
        features += 1
        joined = self.relu(self.norm(joined))
        scores: Tensor = self.head(torch.tanh(self.last(joined) + features.mean()).mean((2, 3)))
        return scores


class Centred(nn.Module):
    """A tap whose every channel sums to zero over its cells, one with a negative sum, and a smooth head behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.zero = nn.InstanceNorm2d(8)
        self.below = nn.GELU()
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b 4)."""
        x = self.zero(self.stem(x))
        x = self.below(x - 2)
        scores: Tensor = self.head(torch.tanh(self.last(x)).mean((2, 3)))
        return scores


def shared() -> nn.Module:
    """The factory of `Shared`."""
    return _seeded(Shared())


def in_place() -> nn.Module:
    """The factory of `InPlace`."""
    return _seeded(InPlace())


def functional_in_place() -> nn.Module:
    """The factory of `FunctionalInPlace`."""
    return _seeded(FunctionalInPlace())


def dense() -> nn.Module:
    """The factory of `Dense`."""
    return _seeded(Dense())


def centred() -> nn.Module:
    """The factory of `Centred`."""
    return _seeded(Centred())


def evidence(network: nn.Module, layer: str, row: Tensor, class_index: int, *, call: int = 0) -> tuple[Tensor, Tensor]:
    """A and dy/dA of one call of a layer, (c h w), before anything behind the layer writes into A.

    Args:
        network: left as it was.
        layer: path of the module.
        row: (c h w).
        class_index: y is its logit.
        call: which one, in order.
    """
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        kept.append(output if output.requires_grad else output.requires_grad_())
        return output.clone()

    handle = network.get_submodule(layer).register_forward_hook(keep)
    with torch.enable_grad():
        score = network(row[None])[0, class_index]
        (gradient,) = torch.autograd.grad(score, [kept[call]])
    handle.remove()
    return kept[call][0].detach(), gradient[0]
