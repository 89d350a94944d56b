"""Three small seeded networks of 64 px, and a transformer of 32 px, that every library and the server are asked about.

What makes libraries go wrong is in them: batch normalisation, biases, max-pooling, functional and in-place ReLUs, a
concatenation, a curved head. `CASES` says at which layers they are looked at; at most 32 channels, so that Score-CAM stays cheap.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

CLASSES = 6
SIDE = 64


class Pooled(nn.Module):
    """Convolution, batch normalisation and ReLU three times; average pooling and one linear layer; last map 16 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 12, 16)
        self.features = nn.Sequential(
            *(
                layer
                for inner, outer in itertools.pairwise(widths)
                for layer in (nn.Conv2d(inner, outer, 3, 2, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU())
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        return self.head(self.pool(self.features(images)).flatten(1))


class Flattened(nn.Module):
    """Convolutions with biases and max-pooling, and a head of two linear layers that sees every cell; last map 16 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(nn.Linear(16 * 8 * 8, 24), nn.ReLU(), nn.Linear(24, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        return self.head(self.features(images).flatten(1))


class Residual(nn.Module):
    """Functional ReLUs, an in-place one, an in-place sum, a concatenation, and a curved head; last map 32 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, 4, 2)
        self.norm = nn.BatchNorm2d(16)
        self.overwrite = nn.ReLU(inplace=True)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.grown = nn.Conv2d(16, 16, 3, 2, 1)
        self.skipped = nn.AvgPool2d(2)
        self.last = nn.Conv2d(32, 32, 1)
        self.curve = nn.SiLU()
        self.hidden = nn.Linear(32 * 4 * 4, 20)
        self.head = nn.Linear(20, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        stem = self.overwrite(self.norm(self.stem(images)))
        block = self.second(torch.relu(self.first(stem)))
        block += stem
        block = torch.relu(block)
        dense = torch.cat([torch.relu(self.grown(block)), self.skipped(block)], dim=1)
        last = torch.relu(self.last(dense))
        cells = nn.functional.avg_pool2d(self.curve(last), 2).flatten(1)
        return self.head(torch.tanh(self.hidden(cells)))


def loud() -> nn.Module:
    """`Residual` with scores a thousand times as large: beside them the constants that libraries add are nothing."""
    net = Residual()
    net.head.weight.data *= 1000
    return net


def transformer() -> nn.Module:
    """Torchvision's vision transformer, 32 px in patches of 8: a grid of 4 x 4, three blocks, two heads."""
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES
    )


def seeded(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Builds it with the same weights each time, in eval mode, with statistics in its batch norms and no vanishing head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = factory().eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.2)
            if isinstance(module, nn.Linear) and bool((module.weight == 0).all()):
                module.weight.data.normal_(0, 0.1)
    return net


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """What a library and the server are asked.

    Attributes:
        net: in eval mode; libraries get a copy, since some of them leave traces.
        image: (1 3 h w).
        layers: names of modules.
        class_index: the target.
    """

    net: nn.Module
    image: Tensor
    layers: tuple[str, ...]
    class_index: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One network, looked at one or more layers.

    Attributes:
        network: its name on the server.
        factory: builds it.
        layers: names of modules.
        side: of its input, pixels.
    """

    network: str
    factory: Callable[[], nn.Module]
    layers: tuple[str, ...]
    side: int = SIDE

    def __str__(self) -> str:
        return f"{self.network} {'+'.join(self.layers)}"

    def question(self, class_index: int = 1) -> Question:
        """Asks about noise, the same for every method."""
        image = torch.randn(1, 3, self.side, self.side, generator=torch.Generator().manual_seed(1))
        return Question(net=network(self.factory), image=image, layers=self.layers, class_index=class_index)


@functools.cache
def network(factory: Callable[[], nn.Module]) -> nn.Module:
    """One network of each kind; nobody may change it."""
    return seeded(factory)


POOLED = Case(network="pooled", factory=Pooled, layers=("features.8",))
POOLED_MIDDLE = Case(network="pooled", factory=Pooled, layers=("features.3",))
FLATTENED = Case(network="flattened", factory=Flattened, layers=("features.7",))
RESIDUAL = Case(network="residual", factory=Residual, layers=("last",))
# Behind it stands an in-place ReLU, which changes what a library without a copy believes the layer said.
OVERWRITTEN = Case(network="residual", factory=Residual, layers=("norm",))
LOUD = Case(network="loud", factory=loud, layers=("last",))
SEVERAL = Case(network="pooled", factory=Pooled, layers=("features.5", "features.8"))
TRANSFORMER = Case(network="transformer", factory=transformer, layers=(), side=32)

# After a ReLU before average pooling, before a ReLU (signed), before a head that sees every cell, and with curvature.
CASES = (POOLED, POOLED_MIDDLE, FLATTENED, RESIDUAL)


def flattened() -> nn.Module:
    """The server's factory of `Flattened`."""
    return copy.deepcopy(network(Flattened))


def transforming() -> nn.Module:
    """The server's factory of the transformer."""
    return copy.deepcopy(network(transformer))
