"""What clients are told of the server and of a model: metadata, and as much of a configuration as they read. Cards arrive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from camserve.server.models.card import ModelCard
from camserve.server.oip.messages import ModelConfigResponse, ModelMetadataResponse
from camserve.server.oip.predictions import PREDICTIONS
from camserve.server.oip.requests import IMAGE, TENSOR
from camserve.server.oip.tensors import DATATYPES
from camserve.server.oip.terms import HEATMAP

__all__ = ["EXTENSIONS", "model_config", "model_metadata"]

EXTENSIONS: Final = (
    "classification",
    "explain",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)
_TYPES: Final[Mapping[str, str]] = MappingProxyType({ours: theirs for theirs, ours in DATATYPES.items()})
_PRIORITIES: Final = 3

_Tensor = tuple[str, str, tuple[int, ...]]


def _inputs(card: ModelCard) -> list[_Tensor]:
    """Name, type and sizes of one row of every input. Of tensor and image a request carries one."""
    recipe = card.recipe
    sizes = (recipe.shape[0], *(-1 for _ in recipe.shape[1:])) if recipe.is_variable else recipe.shape
    found: list[_Tensor] = [(TENSOR, _TYPES[recipe.dtype], sizes)]
    further = [(extra.name, _TYPES.get(extra.dtype, "FP32"), extra.shape) for extra in card.extra_inputs]
    if recipe.takes_images:
        found.append((IMAGE, "BYTES", (1,)))
    names = {name for name, _, _ in further}
    return [entry for entry in found if entry[0] not in names] + further


def _outputs(card: ModelCard) -> list[_Tensor]:
    predicted = [(name, output.datatype, output.sizes(card)) for name, output in PREDICTIONS[card.output_kind].items()]
    return [*predicted, (HEATMAP, "FP32", (-1,) * _map_rank(card))]


def _map_rank(card: ModelCard) -> int:
    layer = card.layer(card.default_layer)
    return len(layer.map_shape) if layer is not None and layer.map_shape else 2


def model_metadata(card: ModelCard, versions: Sequence[str]) -> Any:
    """A ModelMetadataResponse; the batch is the first size of everything."""
    return ModelMetadataResponse(
        name=card.name,
        versions=versions,
        platform=f"pytorch_{card.kind}",
        inputs=_described(_inputs(card)),
        outputs=_described(_outputs(card)),
    )


def _described(tensors: Iterable[_Tensor]) -> list[Any]:
    return [
        ModelMetadataResponse.TensorMetadata(name=name, datatype=datatype, shape=(-1, *sizes))
        for name, datatype, sizes in tensors
    ]


def model_config(card: ModelCard) -> Any:
    """A ModelConfigResponse."""
    response = ModelConfigResponse()
    config = response.config
    config.name, config.platform, config.backend = card.name, f"pytorch_{card.kind}", "camserve"
    config.max_batch_size = card.max_batch_rows
    config.dynamic_batching.priority_levels = _PRIORITIES
    config.dynamic_batching.default_priority_level = 2
    # Either of the two is enough; perf_analyzer must be free to send the one that it was given data for.
    either = {TENSOR, IMAGE} if card.recipe.takes_images else set()
    for name, datatype, sizes in _inputs(card):
        config.input.add(name=name, data_type=_config_type(datatype), dims=sizes, optional=name in either)
    for name, datatype, sizes in _outputs(card):
        config.output.add(name=name, data_type=_config_type(datatype), dims=sizes)
    return response


def _config_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
