"""A model of each kind of output, small enough to know what it must say, and one with a second input."""

from __future__ import annotations

from pathlib import Path

import torch
from support.servers import script_source
from torch import Tensor, nn

from camserve.server.models.config import ExtraConfig, InputConfig, OutputConfig
from camserve.server.models.sources import ModelSource

__all__ = ["PLAIN", "SIDE", "Detector", "Embedder", "Gated", "Reader", "Segmenter", "Stem", "sources_of_kinds"]

SIDE = 32
PLAIN = InputConfig(size=(SIDE, SIDE), mean=(0.0,), std=(1.0,), resize="letterbox")


class Stem(nn.Module):
    """(b 3 32 32) to (b 6 16 16), positive."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Features."""
        return self.relu(self.conv(x))


class Segmenter(nn.Module):
    """A class of two for each of 16 x 16 cells: the first where it is bright, the second where it is dark."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """(b 2 16 16)."""
        bright = self.pool(x).mean(dim=1, keepdim=True)
        return torch.cat([bright, 1 - bright], dim=1)


class Embedder(nn.Module):
    """A vector of six numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()

    def forward(self, x: Tensor) -> Tensor:
        """(b 6)."""
        return self.stem(x).mean(dim=(2, 3))


class Reader(nn.Module):
    """A class of four at each of 16 steps from left to right."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(b 16 4)."""
        return self.head(self.stem(x).mean(dim=2).transpose(1, 2))


class Detector(nn.Module):
    """Always two objects: of class 1 in the left half, of class 2 in the right; the brighter, the surer."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        """As torchvision's detectors do."""
        found: list[dict[str, Tensor]] = []
        boxes = torch.tensor([[0.0, 0.0, 16.0, 32.0], [16.0, 0.0, 32.0, 32.0]])
        features = self.pool(x)
        for row in range(x.shape[0]):
            left, right = features[row, :, :, :8].mean(), features[row, :, :, 8:].mean()
            scores = torch.stack([left, right])
            found.append({"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": scores})
        return found


class Gated(nn.Module):
    """A classifier whose second input chooses where it looks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(b 6)."""
        return (self.stem(x) * mask).mean(dim=(2, 3))


def sources_of_kinds(folder: Path) -> list[ModelSource]:
    """All of them as TorchScript archives, named for their kinds."""
    sources = [
        script_source(name, module, folder, input=PLAIN, output=OutputConfig(kind=name))
        for name, module in (
            ("segmentation", Segmenter()),
            ("embedding", Embedder()),
            ("sequence", Reader()),
            ("detection", Detector()),
        )
    ]
    gated = PLAIN.model_copy(update={"extra": {"mask": ExtraConfig(shape=(1, 16, 16))}})
    return [*sources, script_source("gated", Gated(), folder, input=gated)]
