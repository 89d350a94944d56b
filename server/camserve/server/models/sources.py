"""Where models come from: finds every (name, version) to load, from a repository folder, from flags, or the shipped demo model.

Gives `ModelSource`s to `repository.py` and `lifecycle.py`; looks at file names only and opens nothing but `model.toml`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path

from camserve.server.models.config import (
    FactoryConfig,
    InputConfig,
    ModelConfig,
    PlanConfig,
    VersionsConfig,
    read_config,
    read_labels,
)
from camserve.server.models.versions import version_order, wanted_versions

__all__ = [
    "ModelFolder",
    "ModelSource",
    "demo_sources",
    "files_of",
    "from_flag",
    "is_model_name",
    "read_folder",
    "scan_model",
    "scan_repository",
    "version_order",
]

# In order of preference when a version folder holds several.
_FILES = ("model.pt2", "model.pt", "weights.safetensors", "weights.pth")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RENAME = "; another name can be put before it: --model name=…"
_FACTORY_PREFIXES = ("torchvision:", "timm:")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """One version of one model, not loaded yet.

    Attributes:
        name: of the model.
        version: a folder's name, or "1".
        path: archive or weights; None for a factory that needs none.
        config: the written part of its card.
        folder: of this version in the repository; None for what was given by a flag.
    """

    name: str
    version: str
    path: Path | None
    config: ModelConfig
    folder: Path | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """What a repository holds of one model.

    Attributes:
        name: of the model.
        sources: every version by its name, the newest last.
        wanted: those that serve by the policy of its `model.toml`, the newest last.
        labels: names of versions, by label.
    """

    name: str
    sources: Mapping[str, ModelSource]
    wanted: tuple[ModelSource, ...]
    labels: Mapping[str, str]


def scan_repository(root: Path) -> Iterator[ModelSource]:
    """Finds `<root>/<name>/model.toml` and `<root>/<name>/<version>/<file>`: of each name the versions that serve by its policy.

    Raises:
        ValueError: the folder does not exist, holds no model, or a card is wrong; the text says what was looked for.
    """
    if not root.is_dir():
        raise ValueError(f"model repository {root} is not a folder")
    found = False
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        found = True
        yield from read_folder(folder).wanted
    if not found:
        raise ValueError(
            f"model repository {root} holds no models: expected {root}/<name>/model.toml and <name>/1/model.pt"
        )


def scan_model(folder: Path) -> ModelSource:
    """Finds the newest version of one model: `<folder>/model.toml` and `<folder>/<version>/<file>`.

    Raises:
        ValueError: it holds no version, or its card is wrong.
    """
    return list(read_folder(folder).sources.values())[-1]


def read_folder(folder: Path) -> ModelFolder:
    """Finds every version of one model: `<folder>/model.toml` and `<folder>/<version>/<file>`.

    Raises:
        ValueError: it holds no version, its card is wrong, or the card names a version that is not there.
    """
    card = folder / "model.toml"
    config = read_config(card) if card.is_file() else ModelConfig()
    found = filter(None, (_version(folder.name, path, config) for path in folder.iterdir()))
    sources = {source.version: source for source in sorted(found, key=lambda source: version_order(source.version))}
    if not sources:
        raise ValueError(f"{folder} holds no version: expected {folder}/1/ with one of {', '.join(_FILES)}")
    try:
        wanted = wanted_versions(sources, config.versions)
    except ValueError as error:
        raise ValueError(f"{card}: {error}") from error
    return ModelFolder(
        name=folder.name,
        sources=sources,
        wanted=tuple(sources[version] for version in wanted),
        labels=config.versions.labels,
    )


def is_model_name(text: str) -> bool:
    """Whether a model may be called so: nothing that leads out of a folder is."""
    return _NAME.fullmatch(text) is not None


def _version(name: str, folder: Path, config: ModelConfig) -> ModelSource | None:
    if not folder.is_dir() or not _NAME.fullmatch(folder.name):
        return None
    path = next((folder / file for file in _FILES if (folder / file).is_file()), None)
    if path is None and config.factory is None:
        return None
    return ModelSource(name=_checked(name), version=folder.name, path=path, config=config, folder=folder)


def files_of(source: ModelSource) -> Hashable:
    """What a source was made of, to tell whether that has changed: its card, and size and times of each of its files.

    Raises:
        OSError: a file vanished meanwhile.
    """
    files = [source.path] if source.folder is None else sorted(source.folder.rglob("*"))
    if source.config.output.phrases:
        files.append(Path(source.config.output.phrases))
    # Which versions serve says nothing of how this one does.
    card = source.config.model_copy(update={"versions": VersionsConfig()}).model_dump_json()
    return card, tuple((str(file), *_stamp(file)) for file in files if file is not None)


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def from_flag(
    text: str,
    *,
    size: int | None = None,
    labels: Path | None = None,
    random_seed: int | None = None,
    is_compiled: bool = False,
) -> ModelSource:
    """Reads `--model`: `part.pt`, `name=part.pt`, `torchvision:resnet50` or `name=torchvision:resnet50`.

    Args:
        text: the flag's value.
        size: height and width of the input, pixels; default 224.
        labels: text file, one label a line.
        random_seed: for factories: random weights instead of pretrained ones.
        is_compiled: whether explanations at the default layer are to be compiled.

    Raises:
        ValueError: not a name, no such file, or labels that cannot be read.
    """
    name, equals, target = text.partition("=")
    if not equals:
        name, target = "", text
    config = ModelConfig(
        input=InputConfig() if size is None else InputConfig(size=(size, size)),
        labels=() if labels is None else read_labels(labels),
        plan=PlanConfig(compile=is_compiled),
    )
    if target.startswith(_FACTORY_PREFIXES):
        factory = FactoryConfig(name=target, pretrained=random_seed is None, random_seed=random_seed)
        config = config.model_copy(update={"factory": factory})
        name = name if equals else target.partition(":")[2]
        return ModelSource(name=_checked(name, _RENAME), version="1", path=None, config=config)
    path = Path(target)
    if not path.is_file():
        raise ValueError(f"model file {target} does not exist; write name=path/to/model.pt or torchvision:resnet50")
    return ModelSource(name=_checked(name if equals else path.stem, _RENAME), version="1", path=path, config=config)


def demo_sources() -> list[ModelSource]:
    """The shipped surface-inspection model."""
    return list(scan_repository(Path(__file__).parents[1] / "demo" / "models"))


def _checked(name: str, advice: str = "") -> str:
    if not is_model_name(name):
        raise ValueError(f"{name!r} is not a model name; use letters, digits, '.', '_' and '-', at most 64{advice}")
    return name
