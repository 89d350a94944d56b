"""Networks at the edges of what CAMs are defined for, their maps as a server makes them, and gradients by plain autograd."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from support.servers import settings
from torch import Tensor, nn

from camserve.client import Result, Spec, TensorInput
from camserve.server.local import LocalExplainer
from camserve.server.models.config import InputConfig
from camserve.server.models.sources import ModelSource

__all__ = [
    "INPUT",
    "ROW",
    "Centred",
    "Dense",
    "Shared",
    "assert_close",
    "centred",
    "dense",
    "evidence",
    "explained",
    "functional_in_place",
    "in_place",
    "raw",
    "shared",
    "values_of",
]

ROW = np.random.default_rng(0).standard_normal((3, 32, 32)).astype(np.float32)
INPUT = InputConfig(size=(32, 32))


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


def explained(source: ModelSource, *specs: Spec | str, row: npt.NDArray[np.float32] = ROW, rows: int = 1) -> Result:
    """One input through all stages of a server, in this process."""
    with LocalExplainer(source, settings()) as explainer:
        return explainer.explain(TensorInput(row), specs, batch_rows=rows)


def raw(method: str, *layers: str, target: int | None = 1, **options: object) -> Spec:
    """A spec whose map arrives as it was computed: exact and signed."""
    return Spec(method, layers=layers, target=target, encoding="float32", rectify=False, **options)


def values_of(result: Result) -> list[npt.NDArray[np.float32]]:
    """The maps; nothing may have failed."""
    assert [] == [str(error.error) for error in result.errors]
    return [heatmap.values for heatmap in result.heatmaps]


def assert_close(got: npt.NDArray[np.float32], expected: Tensor, gate: float = 2e-6) -> None:
    """Within so much of the largest value."""
    np.testing.assert_allclose(got, expected.numpy(), atol=gate * float(expected.abs().max()))
