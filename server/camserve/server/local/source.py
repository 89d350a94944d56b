"""Which model is meant, in the words of the command line: a name, a file or a folder becomes a `ModelSource`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from camserve.server.models.config import ModelConfig, read_labels
from camserve.server.models.sources import ModelSource, demo_sources, from_flag, scan_model

__all__ = ["source_of"]


def source_of(
    model: str,
    *,
    labels: Sequence[str] | Path | None = None,
    size: int | tuple[int, int] | None = None,
    random_seed: int | None = None,
) -> ModelSource:
    """Finds a model.

    Args:
        model: what `camserve serve --model` takes, or a folder with a `model.toml`; empty takes the demo model.
        labels: in place of the card's: of the classes in order, or a text file with one a line.
        size: in place of the card's: height and width of the input, pixels.
        random_seed: for factories: random weights instead of pretrained ones.

    Raises:
        ValueError: there is no such model, or its card is wrong.
    """
    source = _found(model, random_seed)
    changed: dict[str, object] = {}
    if labels is not None:
        changed["labels"] = read_labels(labels) if isinstance(labels, Path) else tuple(labels)
    if size is not None:
        pair = (size, size) if isinstance(size, int) else size
        changed["input"] = {**source.config.input.model_dump(exclude_unset=True), "size": pair}
    if not changed:
        return source
    # Read anew rather than copied: a copy would not be checked.
    config = ModelConfig.model_validate({**source.config.model_dump(exclude_unset=True), **changed})
    return ModelSource(name=source.name, version=source.version, path=source.path, config=config)


def _found(model: str, random_seed: int | None) -> ModelSource:
    if not model:
        (source,) = demo_sources()
        return source
    folder = Path(model)
    return scan_model(folder) if folder.is_dir() else from_flag(model, random_seed=random_seed)
