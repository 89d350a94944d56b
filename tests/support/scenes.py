"""A scene over a small model in two halves, for tests of methods that try things out on the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from camserve.server.cam.methods.method import Evidence, Reads, Step
from camserve.server.jobs import Parameters, Profile

__all__ = ["Halves", "ModelScene", "finish", "small_halves"]


class Halves(nn.Module):
    """A model that is cut at the layer of interest."""

    def __init__(self, front: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.front = front
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        """(b c *input) to (b classes)."""
        return self.tail(self.front(x))


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(dim=2)


def small_halves(
    *, axes: int = 2, channels: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64, ends_in_relu: bool = True
) -> Halves:
    """Two strided convolutions, then one more, average pooling, and 4 classes; the layer is a quarter of the input's size."""
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        front = nn.Sequential(
            convolution(3, 6, 3, stride=2, padding=1),
            nn.ReLU(),
            convolution(6, channels, 3, stride=2, padding=1),
            nn.ReLU() if ends_in_relu else nn.Tanh(),
        )
        tail = nn.Sequential(convolution(channels, 8, 3, padding=1), nn.GELU(), _Mean(), nn.Linear(8, 4))
        model = Halves(front, tail)
        # Larger weights make scores that differ from channel to channel by more than rounding.
        for parameter in model.parameters():
            parameter.data.mul_(2)
    return model.to(dtype).eval()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelScene:
    """One row, one class, one cut; refuses batches beyond `chunk_rows`.

    Attributes:
        model: in two halves.
        inputs: (1 c *input).
        class_index: the target; its score is the logit.
        parameters: of the method.
        profile: whose conventions.
        chunk_rows: most rows at once.
        tail_chunk_rows: the same for activations.
        reads: where evidence is taken.
    """

    model: Halves
    inputs: Tensor
    class_index: int = 1
    parameters: Parameters = dataclasses.field(default_factory=Parameters)
    profile: Profile = Profile.PAPER
    chunk_rows: int = 5
    tail_chunk_rows: int = 5
    reads: Reads = Reads.LAYERS

    @property
    def activation(self) -> Tensor:
        """At the cut, or the input."""
        if self.reads is Reads.INPUT:
            return self.inputs
        with torch.no_grad():
            return self.model.front(self.inputs)

    @property
    def score(self) -> float:
        """Of the row as it is."""
        return float(self.scores(self.inputs)[0])

    def generator(self) -> torch.Generator:
        """Seeded by the parameters."""
        return torch.Generator().manual_seed(self.parameters.seed)

    @torch.no_grad()
    def scores(self, inputs: Tensor) -> Tensor:
        """The class's logits."""
        assert len(inputs) <= self.chunk_rows
        return self.model(inputs)[:, self.class_index]

    @torch.no_grad()
    def tail_scores(self, activations: Tensor) -> Tensor:
        """The same from the cut on."""
        assert len(activations) <= self.tail_chunk_rows
        return self.model.tail(activations)[:, self.class_index]

    def evidence(self, inputs: Tensor) -> Evidence:
        """Activation and gradient at the cut, or at the input."""
        assert len(inputs) <= self.chunk_rows
        with torch.enable_grad():
            place = inputs.detach() if self.reads is Reads.INPUT else self.model.front(inputs).detach()
            place.requires_grad_()
            output = self.model(place) if self.reads is Reads.INPUT else self.model.tail(place)
            (gradient,) = torch.autograd.grad(output[:, self.class_index].sum(), place)
        return Evidence(activation=place.detach(), gradient=gradient, parameters=self.parameters)

    def gradient(self) -> Tensor:
        """At the row as it is."""
        gradient = self.evidence(self.inputs).gradient
        assert gradient is not None
        return gradient


def finish(steps: Iterator[Step]) -> Tensor:
    """Takes all steps, checks what every one of them promises, and returns the finished map."""
    done = 0
    maps = []
    for step in steps:
        assert done < step.done <= step.total
        done = step.done
        maps.append(step.best())
        assert maps[0].shape == maps[-1].shape
        assert bool(maps[-1].isfinite().all())
    assert step.done == step.total
    return maps[-1]
