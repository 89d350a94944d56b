"""Reads `model.toml`, the part of a card that a person writes; `loader.py` measures the rest.

Every field has a default that suits a torchvision-style classifier, so that a bare archive needs three lines or none.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    model_validator,
)
from safetensors import SafetensorError
from safetensors.numpy import load_file

from camserve.server.conditions import ExpressionError, check_condition
from camserve.server.jobs import FloatArray, OutputKind
from camserve.server.models.recipe import Channels, InputRecipe, Interpolation, Resize

__all__ = [
    "ExtraConfig",
    "FactoryConfig",
    "InputConfig",
    "ModelConfig",
    "OutputConfig",
    "PlanConfig",
    "RuleConfig",
    "VersionsConfig",
    "read_config",
    "read_labels",
    "read_phrases",
]

_STRICT = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

# In TOML a version is easily written as a number.
_VersionName = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
_VersionLabel = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9._-]{0,63}$")]


class ExtraConfig(BaseModel):
    """An input besides the first, sent as a tensor: `[input.extra.name]`."""

    model_config = _STRICT

    shape: tuple[PositiveInt, ...] = Field((), description="Of one row; empty for one number a row.")
    dtype: Literal["float32", "float64", "float16", "int64", "int32", "uint8", "bool"] = "float32"


class InputConfig(BaseModel):
    """How images become the model's input."""

    model_config = _STRICT

    size: tuple[int, int] = Field((224, 224), description="Height and width of the model's input, pixels.")
    channels: Channels = Field("rgb", description="none for models that take no images: they are sent tensors.")
    shape: tuple[int, ...] | None = Field(None, description="Input of one row, for models that take no images.")
    variable: bool = Field(
        default=False,
        description="Whether other sizes of space are taken as well; size or shape is that of the look at load.",
    )
    resize: Resize = Field("stretch", description="none leaves images as large as they are; needs variable.")
    resize_size: int | None = Field(
        None, description="Shorter side before a centre crop, pixels; default: the input's."
    )
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    pad_value: int = Field(0, ge=0, le=255, description="Gray value around a letterboxed image.")
    extra: dict[str, ExtraConfig] = Field(
        default_factory=dict, description="Further inputs, in the order in which the model takes them."
    )


class OutputConfig(BaseModel):
    """What the model returns."""

    model_config = _STRICT

    kind: OutputKind = Field(
        OutputKind.CLASSIFICATION,
        description="classification, multi-label, regression, embedding, segmentation, sequence or detection.",
    )
    path: str = Field("", description="Key or index of the logits when the model returns a dict or a tuple.")
    phrases: str = Field("", description="Safetensors file beside model.toml: a vector for each phrase.")


class FactoryConfig(BaseModel):
    """A Python factory instead of an archive."""

    model_config = _STRICT

    name: str = Field(
        description="torchvision:resnet50, timm:convnext_tiny, or an allow-listed package.module:function."
    )
    pretrained: bool = False
    allowed_imports: tuple[str, ...] = Field(
        (), description="Modules from which package.module:function may be imported."
    )
    random_seed: int | None = Field(None, description="Random weights, for benchmarks; marked on the card.")


class PlanConfig(BaseModel):
    """How the model is run, beyond what is chosen at load."""

    model_config = _STRICT

    compile: bool = Field(
        default=False,
        description="Whether explanations at the default layer are compiled in the background; needs a C++ compiler.",
    )
    batch_sizes: tuple[PositiveInt, ...] = Field(
        (),
        description="Rows of the compiled graphs; default: powers of two, and the most rows of a pass. "
        "Each takes a minute and the memory of the weights.",
    )


class VersionsConfig(BaseModel):
    """Which versions of the model serve: `[versions]`."""

    model_config = _STRICT

    policy: Literal["latest", "all", "listed"] = "latest"
    latest: PositiveInt = Field(1, description="How many of the newest, under policy latest.")
    listed: tuple[_VersionName, ...] = Field((), description="Which ones, under policy listed.")
    labels: dict[_VersionLabel, _VersionName] = Field(
        default_factory=dict,
        description="Names that requests may give in place of a version, such as stable; what they name serves as well.",
    )

    @model_validator(mode="after")
    def _fields_belong_to_the_policy(self) -> Self:
        # Values other than the defaults: a whole card is written out for the process that compiles.
        for field, is_given in (("latest", self.latest != 1), ("listed", bool(self.listed))):
            if is_given and self.policy != field:
                raise ValueError(f"{field} is given, but the policy is {self.policy!r}; set policy to {field!r}")
        if self.policy == "listed" and not self.listed:
            raise ValueError("the policy is 'listed' and no version is; write listed = [\"1\"], or take another policy")
        return self


class RuleConfig(BaseModel):
    """When to explain without being asked: `[[explain]]`.

    All other keys are fields of the wire's `Spec`, in the wire's own words: what is to be explained, and how.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="In answers, metrics and logs; unique in the model."
    )
    when: str = Field("", description="A CEL expression over the prediction and the request; empty always holds.")
    sample: float = Field(1.0, ge=0, le=1, description="Share of the requests it is applied to, by their ids.")
    method: str = Field(description="Such as grad-cam.")

    @property
    def asks(self) -> Mapping[str, object]:
        """What it asks for, as it was written: a `Spec` of the wire."""
        return {"method": self.method, **(self.model_extra or {})}

    @model_validator(mode="after")
    def _condition_compiles(self) -> Self:
        if self.when:
            try:
                check_condition(self.when)
            except ExpressionError as error:
                raise ValueError(f"rule {self.name!r}, when: {error}") from error
        return self


class ModelConfig(BaseModel):
    """`model.toml`."""

    model_config = _STRICT

    labels: tuple[str, ...] = ()
    labels_file: str = Field("", description="Text file beside model.toml, one label a line.")
    input: InputConfig = InputConfig()
    output: OutputConfig = OutputConfig()
    factory: FactoryConfig | None = None
    default_layer: str = Field("", description="Explained when a spec names no layer; empty lets the probe choose.")
    max_batch: int | None = Field(None, ge=1, description="Most rows in one pass; default: the server's.")
    plan: PlanConfig = PlanConfig()
    versions: VersionsConfig = VersionsConfig()
    precision: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    explain: tuple[RuleConfig, ...] = Field((), description="When to explain without being asked.")
    _path: str = PrivateAttr("model.toml")

    @property
    def path(self) -> str:
        """The file it was read from, for messages."""
        return self._path

    @model_validator(mode="after")
    def _rules_have_names_of_their_own(self) -> Self:
        twice = [name for name, count in Counter(rule.name for rule in self.explain).items() if count > 1]
        if twice:
            raise ValueError(f"rule {twice[0]!r} is written twice; give each [[explain]] a name of its own")
        return self

    @model_validator(mode="after")
    def _phrases_need_an_embedding(self) -> Self:
        if self.output.phrases and self.output.kind is not OutputKind.EMBEDDING:
            raise ValueError(
                f"output.phrases are compared with embeddings, and output.kind is {self.output.kind.value!r}; "
                "leave the phrases out, or set output.kind to 'embedding' if the model returns one"
            )
        return self

    def recipe(self) -> InputRecipe:
        """The preprocessing these fields describe; rows for half precision are made in single and cast on the device."""
        given = self.input
        mean, std = given.mean, given.std
        if given.channels in {"gray", "none"}:
            # The defaults are ImageNet's, for three channels.
            mean = mean if "mean" in given.model_fields_set else (0.0,)
            std = std if "std" in given.model_fields_set else (1.0,)
        return InputRecipe(
            shape=given.shape or (1 if given.channels == "gray" else 3, *given.size),
            dtype="float64" if self.precision == "float64" else "float32",
            resize=given.resize,
            resize_size=given.resize_size,
            interpolation=given.interpolation,
            channels=given.channels,
            pad_value=given.pad_value,
            is_variable=given.variable,
            mean=mean,
            std=std,
        )


def read_config(path: Path) -> ModelConfig:
    """Reads and checks a `model.toml`; files named in it are taken from beside it.

    Raises:
        ValueError: not TOML, or a field is unknown or wrong; the text names file and field.
    """
    try:
        config = ModelConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        lines = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{path}: {lines}") from error
    if config.explain:
        config._path = str(path)  # noqa: SLF001 - known only where it was read, and no field that a card could set
    try:
        config.recipe()
    except ValueError as error:
        raise ValueError(f"{path}: input: {error}") from error
    if config.output.phrases:
        phrases = str(path.parent / config.output.phrases)
        config = config.model_copy(update={"output": config.output.model_copy(update={"phrases": phrases})})
    if config.labels_file:
        if config.labels:
            raise ValueError(f"{path}: labels and labels_file are both given; keep one")
        config = config.model_copy(update={"labels": read_labels(path.parent / config.labels_file)})
    return config


def read_labels(path: Path) -> tuple[str, ...]:
    """Reads a text file of class labels, one a line, in order of class index.

    Raises:
        ValueError: it cannot be read, or a line before the last label is empty: dropping it would shift every label after.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the labels in {path}: {error}") from error
    labels = tuple(line.strip() for line in lines)
    if "" in labels:  # An empty file has one such line.
        raise ValueError(f"{path}, line {labels.index('') + 1}: it is empty; write one label for each class")
    return labels


def read_phrases(path: Path, dimensions: int) -> Mapping[str, FloatArray]:
    """Reads a safetensors file of embeddings by phrase, in order of phrase.

    Args:
        path: of the file.
        dimensions: of the model's embedding.

    Raises:
        ValueError: it cannot be read, holds no phrase, or a value is not one finite vector of these dimensions, or is zero.
    """
    try:
        found = {phrase: values.astype(np.float32) for phrase, values in sorted(load_file(path).items())}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"cannot read the phrases in {path}: {error}; save a float32 vector for each with safetensors"
        ) from error
    if not found:
        raise ValueError(f"{path}: it holds no phrase; save a vector for each, by its text")
    for phrase, values in found.items():
        if values.shape != (dimensions,) or not np.isfinite(values).all() or not values.any():
            raise ValueError(
                f"{path}: phrase {phrase!r} is a tensor of shape {values.shape}; each must be one finite vector, not zero, "
                f"of the {dimensions} dimensions of the model's embedding"
            )
    return found
