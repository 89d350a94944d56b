"""Networks of which something cannot be explained, each for one reason; served as any kind of program.

Eager ones are made by the factories `support.refusing:<name>`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from support.nets import TinyNet
from torch import Tensor, nn

from camserve.server.models.config import FactoryConfig, InputConfig, ModelConfig, OutputConfig
from camserve.server.models.sources import ModelSource

__all__ = ["KINDS", "decided", "detached", "functional", "rounded", "served_as", "tokens", "two_outputs"]

KINDS = ("eager", "scripted", "traced", "exported")


SIZE = (32, 32)


class Functional(TinyNet):
    """Calls its last ReLU as a function."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        features = nn.functional.relu(self.body[0](self.stem(x)))
        scores: Tensor = self.head(features.mean((2, 3)))
        return scores


class Decided(TinyNet):
    """Returns its decision, one-hot, instead of its scores."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        scores = self.head(self.body(self.stem(x)).mean((2, 3)))
        return nn.functional.one_hot(scores.argmax(1), 4).to(x.dtype)


class Detached(TinyNet):
    """Trained with a frozen body: its features are detached."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        scores: Tensor = self.head(self.body(self.stem(x)).detach().mean((2, 3)))
        return scores


class Rounded(TinyNet):
    """Rounds its features, as quantisation does: the derivative is zero everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        scores: Tensor = self.head((self.body(self.stem(x)) * 8).round().mean((2, 3)))
        return scores


class TwoOutputs(TinyNet):
    """Class scores, and a picture that a layer behind them draws; the decision beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(b 3 h w) to (b classes), (b classes) and (b 5 8 8)."""
        scores = self.head(self.body(self.stem(x)).mean((2, 3)))
        drawn = self.decoder(scores[:, :, None, None].expand(-1, -1, 8, 8))
        decision = nn.functional.one_hot(scores.argmax(1), 4).to(x.dtype)
        return {"logits": scores, "decision": decision, "picture": drawn}


class Tokens(nn.Module):
    """A small vision transformer with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 32 32) to (b 4)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1)
        scores: Tensor = self.head(self.encoder(tokens)[:, 0])
        return scores


def functional() -> nn.Module:
    """The factory of `Functional`."""
    return Functional()


def decided() -> nn.Module:
    """The factory of `Decided`."""
    return Decided()


def detached() -> nn.Module:
    """The factory of `Detached`."""
    return Detached()


def rounded() -> nn.Module:
    """The factory of `Rounded`."""
    return Rounded()


def two_outputs() -> nn.Module:
    """The factory of `TwoOutputs`."""
    return TwoOutputs()


def tokens() -> nn.Module:
    """The factory of `Tokens`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tokens()


def served_as(
    kind: str, factory: Callable[[], nn.Module], folder: Path, *, path: str = "", **config: object
) -> ModelSource:
    """The model as a program of a kind, named for both.

    Args:
        kind: of `KINDS`.
        factory: one of this file, or of another one's top level.
        folder: for the archive.
        path: of its scores in the output.
        **config: further fields of the model's configuration.
    """
    name = f"{factory.__name__.replace('_', '-')}-{kind}"
    given: dict[str, object] = {"input": InputConfig(size=SIZE), "output": OutputConfig(path=path), **config}
    if kind == "eager":
        module = factory.__module__
        built = FactoryConfig(name=f"{module}:{factory.__name__}", allowed_imports=(module,), random_seed=0)
        return ModelSource(name=name, version="1", path=None, config=ModelConfig(factory=built, **given))
    network, example = factory().eval(), torch.zeros(2, 3, *SIZE)
    archive = folder / f"{name}.{'pt2' if kind == 'exported' else 'pt'}"
    if kind == "exported":
        shapes = ({0: torch.export.Dim("rows", min=1, max=64)},)
        torch.export.save(torch.export.export(network, (example,), dynamic_shapes=shapes), archive)
    elif kind == "traced":
        # As people do it: without gradients, which lets transformers take their fused kernels.
        with torch.no_grad():
            torch.jit.save(torch.jit.trace(network, example, strict=False), str(archive))
    else:
        torch.jit.save(torch.jit.script(network), str(archive))
    return ModelSource(name=name, version="1", path=archive, config=ModelConfig(**given))
