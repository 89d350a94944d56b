"""Small models in every form that is served, to try each method on: what works on them works on their kind.

`trials.py` loads them. Weights are random and mean nothing. TorchScript reads the annotations of `forward`: plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from camserve.server.models.config import FactoryConfig, InputConfig, ModelConfig
from camserve.server.models.sources import ModelSource

__all__ = ["FORMS", "SIDE", "sources"]

SIDE: Final = 32
FORMS: Final = {
    "scripted": "TorchScript, scripted",
    "traced": "TorchScript, traced",
    "exported": "torch.export",
    "eager": "eager factory",
    "functional": "eager factory that calls functional ReLUs",
    "transformer-scripted": "vision transformer, TorchScript",
    "transformer-exported": "vision transformer, torch.export",
    "transformer-eager": "vision transformer, eager factory",
}
"""How a model can come, by a short name."""
_HERE: Final = "camserve.server.reference.models"


class Convolutional(nn.Module):
    """Convolutions, normalisation and ReLUs, average pooling and one linear layer: what most classifiers are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        scores: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return scores


class Functional(Convolutional):
    """The same with `torch.relu` in place of a module: no hook sees it."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        scores: Tensor = self.head(torch.relu(self.body(self.stem(x))).mean((2, 3)))
        return scores


class Block(nn.Module):
    """Attention and two linear layers over tokens, each with a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b tokens width) to the same."""
        rows, tokens, width = x.shape
        packed = self.qkv(self.norm(x)).reshape(rows, tokens, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.projection(mixed.transpose(1, 2).reshape(rows, tokens, width))
        tokens_out: Tensor = x + self.mlp(x)
        return tokens_out


class Transformer(nn.Module):
    """A vision transformer: patches, a class token, two blocks of attention."""

    def __init__(self, *, side: int = SIDE, patch: int = 4, width: int = 16, depth: int = 2, classes: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + (side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.position
        scores: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return scores


def convolutional() -> nn.Module:
    """For a factory."""
    return Convolutional()


def functional() -> nn.Module:
    """For a factory."""
    return Functional()


def transformer() -> nn.Module:
    """For a factory."""
    return Transformer()


def sources(folder: Path) -> Iterator[ModelSource]:
    """Writes every form into a folder, in the order of `FORMS`; a source's name is its form's."""
    images = torch.zeros(2, 3, SIDE, SIDE)
    yield _script("scripted", torch.jit.script(_made(Convolutional)), folder)
    yield _script("traced", torch.jit.trace(_made(Convolutional), images), folder)  # type: ignore[no-untyped-call]  # Torch's.
    yield _export("exported", _made(Convolutional), images, folder)
    yield _factory("eager", "convolutional")
    yield _factory("functional", "functional")
    yield _script("transformer-scripted", torch.jit.script(_made(Transformer)), folder)
    yield _export("transformer-exported", _made(Transformer), images, folder)
    yield _factory("transformer-eager", "transformer")


def _made(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return kind().eval()


def _config(**more: object) -> ModelConfig:
    return ModelConfig.model_validate({"input": InputConfig(size=(SIDE, SIDE)), **more})


def _script(name: str, program: torch.jit.ScriptModule, folder: Path) -> ModelSource:
    path = folder / f"{name}.pt"
    torch.jit.save(program, str(path))
    return ModelSource(name=name, version="1", path=path, config=_config())


def _export(name: str, net: nn.Module, images: Tensor, folder: Path) -> ModelSource:
    path = folder / f"{name}.pt2"
    program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return ModelSource(name=name, version="1", path=path, config=_config())


def _factory(name: str, function: str) -> ModelSource:
    factory = FactoryConfig(name=f"{_HERE}:{function}", allowed_imports=(_HERE,), random_seed=0)
    return ModelSource(name=name, version="1", path=None, config=_config(factory=factory))
