"""Models that fail under way: one breaks in the middle of Ablation-CAM, one has memory for a single row, one is slow.

Served through the factories `support.fragile:<name>`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from support.nets import TinyNet
from torch import Tensor, nn

from camserve.server.models.config import FactoryConfig, InputConfig, ModelConfig
from camserve.server.models.sources import ModelSource

__all__ = [
    "MARK",
    "SLOW",
    "Breaks",
    "GradientFree",
    "GradientsOnly",
    "Greedy",
    "OneRowOnly",
    "Slow",
    "breaks",
    "fragile_source",
    "gradient_free",
    "gradients_only",
    "greedy",
    "one_row_only",
    "slow",
]

MARK = 20.0
"""A pixel of this value in every channel marks an input; standard normal ones have none."""

_BREAKS_AT = 7


class Breaks(nn.Module):
    """Raises for a marked input one of whose channels was taken away: in the eighth of twelve tries of Ablation-CAM."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 4)
        with torch.no_grad():
            # The first channel hands the mark on.
            self.body.weight[0].zero_()
            self.body.weight[0, :, 1, 1] = 1

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b 4)."""
        features = self.body(x)
        is_marked = features[:, 0].flatten(1).amax(1) > 2 * MARK
        if bool((is_marked & (features[:, _BREAKS_AT] == 0).flatten(1).all(1)).any()):
            raise ValueError("channel 7 is missing")
        scores: Tensor = self.head(nn.functional.softplus(features).mean((2, 3)))
        return scores


class OneRowOnly(TinyNet):
    """Runs out of memory with more than one row, once it is loaded."""

    allowance = 64

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        if len(x) > OneRowOnly.allowance:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        scores: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return scores


class Greedy(TinyNet):
    """Asks the CPU for more memory than there is when it sees a marked input."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        if float(x.detach().max()) >= MARK:
            x = x + x.new_empty(2**56).mean()
        scores: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return scores


class GradientsOnly(TinyNet):
    """Raises for a marked input in every forward but those that are to be differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        if float(x.detach().max()) >= MARK and not torch.is_grad_enabled():
            raise RuntimeError("nobody wants my gradient")
        scores: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return scores


class GradientFree(TinyNet):
    """Raises for a marked input in every forward that is to be differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        if float(x.detach().max()) >= MARK and torch.is_grad_enabled():
            raise RuntimeError("I would rather not be differentiated")
        scores: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return scores


class Pace:
    """How the slow model goes: a test lets each forward through."""

    def __init__(self) -> None:
        self.is_held = False
        self.turns = threading.Semaphore(0)
        self.waiting = threading.Semaphore(0)


SLOW = Pace()


class Slow(TinyNet):
    """Waits, while the test holds it, for leave to make each forward."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        if SLOW.is_held:
            SLOW.waiting.release()
            if not SLOW.turns.acquire(timeout=180):
                raise RuntimeError("nobody let it through")
        scores: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return scores


def breaks() -> nn.Module:
    """The factory of `Breaks`."""
    return Breaks()


def one_row_only() -> nn.Module:
    """The factory of `OneRowOnly`."""
    return OneRowOnly()


def gradients_only() -> nn.Module:
    """The factory of `GradientsOnly`."""
    return GradientsOnly()


def gradient_free() -> nn.Module:
    """The factory of `GradientFree`."""
    return GradientFree()


def greedy() -> nn.Module:
    """The factory of `Greedy`."""
    return Greedy()


def slow() -> nn.Module:
    """The factory of `Slow`."""
    return Slow()


def fragile_source(factory: Callable[[], nn.Module], **config: object) -> ModelSource:
    """The model made by one of the factories here, named like it."""
    given: dict[str, object] = {"input": InputConfig(size=(32, 32)), "default_layer": "body", **config}
    built = FactoryConfig(
        name=f"support.fragile:{factory.__name__}", allowed_imports=("support.fragile",), random_seed=0
    )
    name = factory.__name__.replace("_", "-")
    return ModelSource(name=name, version="1", path=None, config=ModelConfig(factory=built, **given))
