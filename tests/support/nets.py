"""Tiny networks whose maps can be worked out, for tests that need a model of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyNet(nn.Module):
    """Two convolutions, average pooling, one linear layer; 32 px in, 4 classes out, maps of 8 x 8."""

    def __init__(self, classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU())
            self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU())
            self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class MeanColour(nn.Module):
    """An identity of sorts: the logits are the mean of each channel, so that every answer tells its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 3, 1, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.eye(3)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b 3)."""
        return self.features(x).mean((2, 3))


class FailsOnBrightRows(TinyNet):
    """Raises for any batch that holds a bright input: one bad row among good ones."""

    def forward(self, x: Tensor) -> Tensor:
        """Raises when the mean of a row is above 2."""
        if bool((x.mean((1, 2, 3)) > 2).any()):
            raise RuntimeError("this row is too bright for me")
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class NotFinite(TinyNet):
    """Gives NaN scores for rows whose mean is above 2."""

    def forward(self, x: Tensor) -> Tensor:
        """NaN where the mean of a row is above 2."""
        logits = self.head(self.body(self.stem(x)).mean((2, 3)))
        return torch.where((x.mean((1, 2, 3)) > 2)[:, None], torch.full_like(logits, float("nan")), logits)
