"""The same networks behind a real server, asked through the real client.

Each network is served in another form: as an exported program, from a factory, as a TorchScript archive. Inputs are tensors, maps
come as float32 at the layer's resolution unless a spec says otherwise.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from contract.conformance import networks
from contract.conformance.networks import Question
from support.servers import script_source

from camserve.client import Client, Heatmap, Spec, TensorInput
from camserve.server.models.config import FactoryConfig, InputConfig, ModelConfig
from camserve.server.models.sources import ModelSource
from camserve.v1 import spec_pb2

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """A spec without what the question tells.

    Attributes:
        method: slug.
        profile: whose conventions.
        spec: other fields of the client's `Spec`.
        parameters: fields of the message `Parameters`.
        smoothing: fields of the message `Smoothing`.
        has_layers: whether the method is asked at the question's layers.
        has_target: whether it is asked about the question's class.
    """

    method: str
    profile: str = "paper"
    spec: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    smoothing: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    has_layers: bool = True
    has_target: bool = True

    def to_proto(self, question: Question, layers: Sequence[str]) -> spec_pb2.Spec:
        """The message."""
        message = Spec(
            self.method,
            layers=layers if self.has_layers else (),
            target=question.class_index if self.has_target else None,
            profile=self.profile,
            encoding="float32",
            **self.spec,
        ).to_proto()
        if self.parameters:
            message.parameters.MergeFrom(spec_pb2.Parameters(**self.parameters))
        if self.smoothing:
            message.smoothing.MergeFrom(spec_pb2.Smoothing(**self.smoothing))
        return message


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server with the networks."""

    client: Client

    def heatmaps(
        self, network: str, question: Question, asked: Asked, layers: Sequence[str] | None = None
    ) -> tuple[Heatmap, ...]:
        """Every map of one spec, at the question's layers unless others are named."""
        spec = asked.to_proto(question, question.layers if layers is None else layers)
        answer = self.client.explain(TensorInput(question.image[0].numpy()), model=network, specs=[spec])
        answer.raise_for_errors()
        return answer.heatmaps

    def map(self, network: str, question: Question, asked: Asked, layers: Sequence[str] | None = None) -> Array:
        """The only map: (h w), or (c h w) where it has channels, as libraries order them."""
        (heatmap,) = self.heatmaps(network, question, asked, layers)
        values = np.asarray(heatmap.values)
        return values.transpose(2, 0, 1) if values.ndim == 3 else values


def sources(folder: Path) -> list[ModelSource]:
    """All networks, each in its form."""
    return [
        _exported("pooled", networks.network(networks.Pooled), folder),
        _made("flattened", "flattened", networks.SIDE),
        _scripted("residual", networks.network(networks.Residual), folder),
        transformer_source(),
        _scripted("loud", networks.network(networks.loud), folder),
    ]


def transformer_source() -> ModelSource:
    """The model `transformer`, for methods that read attention."""
    return _made("transformer", "transforming", networks.TRANSFORMER.side)


def _scripted(name: str, net: torch.nn.Module, folder: Path) -> ModelSource:
    size = InputConfig(size=(networks.SIDE, networks.SIDE))
    return script_source(name, copy.deepcopy(net), folder, input=size)


def _exported(name: str, net: torch.nn.Module, folder: Path) -> ModelSource:
    images = torch.zeros(2, 3, networks.SIDE, networks.SIDE)
    program = torch.export.export(copy.deepcopy(net), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    path = folder / f"{name}.pt2"
    torch.export.save(program, path)
    config = ModelConfig(input=InputConfig(size=(networks.SIDE, networks.SIDE)))
    return ModelSource(name=name, version="1", path=path, config=config)


def _made(name: str, function: str, side: int) -> ModelSource:
    factory = FactoryConfig(
        name=f"contract.conformance.networks:{function}",
        allowed_imports=("contract.conformance.networks",),
        random_seed=0,
    )
    return ModelSource(
        name=name,
        version="1",
        path=None,
        config=ModelConfig(factory=factory, input=InputConfig(size=(side, side))),
    )
