"""The text of a new `model.toml`: what was said on the command line, and beside it what can be said.

Arrives: the fields that are known, as `model.toml` has them. Leaves: TOML with comments, which reads back as those fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from camserve.server.models.config import ModelConfig

__all__ = ["LABELS_FILE", "card_text", "labels_text"]

LABELS_FILE = "labels.txt"
_REMARKS = {
    "size": "height and width of the input, pixels",
    "channels": "rgb, bgr, gray, or none for models that are sent tensors",
    "resize": "stretch, crop the centre, or letterbox",
    "resize_size": "shorter side before the crop, pixels",
    "mean": "subtracted from each channel after scaling to 0 to 1",
    "std": "divides each channel then",
    "shape": "of one row",
    "kind": "classification, multi-label, regression, embedding, segmentation, sequence or detection",
    "path": "where the output is in what the model returns",
}


def card_text(config: ModelConfig, *, default_layer: str, told: str, has_labels: bool) -> str:
    """Writes the card of a model.

    Args:
        config: what is to be written; its labels go to a file of their own.
        default_layer: what the look at load chose, for a comment where the card does not choose.
        told: where the archive comes from, in a sentence.
        has_labels: whether there is a file of labels.
    """
    return "\n".join(_lines(config, default_layer, told, has_labels=has_labels)) + "\n"


def labels_text(labels: tuple[str, ...]) -> str:
    """One a line, as `model.toml` names them."""
    return "".join(f"{label}\n" for label in labels)


def _lines(config: ModelConfig, default_layer: str, told: str, *, has_labels: bool) -> Iterator[str]:
    yield f"# {told}"
    yield "# All fields: docs/operations.md, 'What a model takes and returns'. After a change: camserve models check."
    if has_labels:
        yield f'labels_file = "{LABELS_FILE}"  # one a line, in order of class index'
    else:
        yield '# labels = ["good", "scratch"]  # or labels_file; one for each class, in order of class index'
    if config.default_layer:
        yield f"default_layer = {_written(config.default_layer)}"
    else:
        yield f"# default_layer = {_written(default_layer)}  # chosen at load while this is left out"
    yield "# max_batch = 16  # most rows in one pass, if the server's limit is too much for this model"
    yield "\n[input]"
    yield from _table(_input(config))
    yield "\n[output]"
    yield from _table(
        config.output.model_dump(mode="json", include={"kind", "path"}, exclude_defaults=True)
        or {"kind": "classification"}
    )


def _input(config: ModelConfig) -> Mapping[str, Any]:
    """What decides how images become the input, also where it is the default: nobody should have to guess."""
    given = config.input
    recipe = config.recipe()
    if not recipe.takes_images:
        return {"channels": given.channels, "shape": given.shape}
    known: dict[str, Any] = {"size": given.size, "channels": given.channels, "resize": given.resize}
    if given.resize_size is not None:
        known["resize_size"] = given.resize_size
    return {**known, "interpolation": given.interpolation, "mean": recipe.mean, "std": recipe.std}


def _table(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        remark = f"  # {_REMARKS[name]}" if name in _REMARKS else ""
        yield f"{name} = {_written(value)}{remark}"


def _written(value: Any) -> str:
    """JSON's texts, numbers and lists are TOML's as well."""
    return json.dumps(value, ensure_ascii=False)
