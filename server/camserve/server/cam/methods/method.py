"""What a method is: an entry of the table, what it is computed from, and the three forms its arithmetic can take.

The files beside this one hold the methods, a family each; `__init__.py` joins them into the table. `engine/` prepares what a
method needs and calls it. A method never sees a model: only tensors, or the questions a `Scene` answers.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from camserve.server.errors import Reason, Unsupported
from camserve.server.jobs import Fusion, Parameters, Profile

__all__ = [
    "Amplified",
    "Arithmetic",
    "Contrast",
    "Evidence",
    "Family",
    "Layerwise",
    "Method",
    "Need",
    "Reads",
    "Scene",
    "Step",
    "Whole",
    "WorkClass",
]


class Need(enum.StrEnum):
    """What a method is computed from, besides the activation that all of them need."""

    GRADIENT = "gradient"
    LINEAR_HEAD = "linear head"
    CURVATURE = "curvature"
    """The Hessian-vector product at the activation: a second backward pass."""
    GUIDED_GRADIENT = "guided gradient"
    """The input's gradient under guided backpropagation."""
    DECONVNET_GRADIENT = "deconvnet gradient"
    """The input's gradient under the deconvnet's rule."""


class Reads(enum.StrEnum):
    """Where in the model a method looks."""

    LAYERS = "layers"
    """At the layers its spec names: one map each, fused into one."""
    INPUT = "input"
    """At the model's input; a spec names no layers."""
    BIASES = "biases"
    """At the input and at every layer that adds a constant; a spec names no layers."""
    ATTENTION = "attention"
    """At the probabilities of every attention; a spec names no layers."""


class WorkClass(enum.StrEnum):
    """How much of the device a method takes; the scheduler's words."""

    FORWARD_ONLY = "A"
    ONE_GRADIENT = "B"
    AMPLIFIED = "C"


class Family(enum.StrEnum):
    """Methods that are read in the same way; each has a page in the docs."""

    GRADIENT_WEIGHTED = "gradient-weighted"
    COMPONENTS = "components"
    PERTURBATION = "perturbation"
    INPUT_SPACE = "input-space"
    ATTENTION = "attention"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """What was captured at one place, for rows that share their parameters.

    Attributes:
        activation: A, channels first; of an attention (b heads queries keys); at the input, the input.
        gradient: g = dy/dA.
        class_weight: the linear head's weights of each row's class.
        curvature: H A, the Hessian of y with respect to A times A.
        input_gradient: dy/dx under the rule the method needs, (b c *input).
        bias: what the layer adds to each channel, for `Reads.BIASES`; None at the input.
        grid: of an attention, the grid that its keys lie on once `prefix` of them are dropped; None for a plain sequence.
        prefix: of an attention, how many keys before those of the grid belong to no place, such as the class token.
        parameters: of the method.
    """

    activation: Float[Tensor, "b c *space"]
    gradient: Float[Tensor, "b c *space"] | None = None
    class_weight: Float[Tensor, "b c"] | None = None
    curvature: Float[Tensor, "b c *space"] | None = None
    input_gradient: Float[Tensor, "b channels *input"] | None = None
    bias: Float[Tensor, "c"] | None = None
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    parameters: Parameters = dataclasses.field(default_factory=Parameters)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where an amplified method stands after a chunk of its work.

    Attributes:
        done: units of work so far, such as channels or noisy copies.
        total: all of them.
        best: makes the map of what is done so far, (*space), or (c *space) for a method in input space; raw and signed.
    """

    done: int
    total: int
    best: Callable[[], Tensor]


class Scene(Protocol):
    """One row with one target at one layer, for a method that has to try things out on the model.

    Everything is on the model's device. Batches handed in may have any number of rows up to `chunk_rows`; each is one unit of
    work. They are not kept: a method may fill the same tensor again. Nothing else is kept between calls but what the attributes
    say.
    """

    @property
    def inputs(self) -> Float[Tensor, "1 channels *input"]:
        """The row as the model took it."""
        ...

    @property
    def activation(self) -> Float[Tensor, "1 c *space"]:
        """A at the layer, channels first."""
        ...

    @property
    def parameters(self) -> Parameters:
        """Of the method."""
        ...

    @property
    def profile(self) -> Profile:
        """Whose conventions to follow."""
        ...

    @property
    def chunk_rows(self) -> int:
        """Most rows that may be tried at once; a method yields after each such chunk."""
        ...

    @property
    def tail_chunk_rows(self) -> int:
        """The same for activations: what lies behind a layer is shorter than the whole, so there may be more."""
        ...

    @property
    def score(self) -> float:
        """The target's score for the row as it is."""
        ...

    def generator(self) -> torch.Generator:
        """A new generator on the CPU, seeded by the parameters: the same numbers on every device."""
        ...

    def scores(self, inputs: Float[Tensor, "n channels *input"]) -> Float[Tensor, "n"]:
        """The target's score for other inputs, without grad."""
        ...

    def tail_scores(self, activations: Float[Tensor, "n c *space"]) -> Float[Tensor, "n"]:
        """The target's score with the layer's activation replaced; only what lies behind the layer is run."""
        ...

    def evidence(self, inputs: Float[Tensor, "n channels *input"]) -> Evidence:
        """What a method of class B would be given at the layer (at the input for `Reads.INPUT`) for other inputs."""
        ...

    def gradient(self) -> Float[Tensor, "1 c *space"]:
        """G at the layer for the row as it is, for ranking channels."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Layerwise:
    """A map from one layer: a product for each channel, then those brought together.

    Attributes:
        weigh: evidence to (b c *space): each channel's contribution to the map.
        gather: brings channels together; their sum, unless the method is about components.
    """

    weigh: Callable[[Evidence], Tensor]
    gather: Callable[[Tensor], Tensor] = lambda products: products.sum(dim=1)


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """A map from everything the method reads at once.

    Attributes:
        draw: all evidence to (b *space), or (b c *input) when `has_channels`.
        has_channels: the map is in input space and keeps the input's channels.
    """

    draw: Callable[[Sequence[Evidence]], Tensor]
    has_channels: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Amplified:
    """A map from many passes over one row.

    Attributes:
        steps: yields after each chunk of work; the last step is the finished map.
        has_channels: as for `Whole`.
        maps: how many maps the steps give: their first axis, if more than one, such as concepts; None for one.
    """

    steps: Callable[[Scene], Iterator[Step]]
    has_channels: bool = False
    maps: Callable[[Parameters], int] | None = None


Arithmetic: TypeAlias = Layerwise | Whole | Amplified


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """Turns the target y_c into y_c - weight * (weighted mean of its nearest classes' scores), as Finer-CAM does.

    Attributes:
        classes: how many of the classes nearest in score.
        weight: gamma.
        by_probability: weigh them by their softmax probabilities, and differentiate those too, as pytorch-grad-cam does.
    """

    classes: int
    weight: float
    by_probability: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One line of the table.

    Attributes:
        slug: its name in requests, file names and records.
        title: its name in prose.
        paper: where it was published, and which equation is computed.
        family: the page of the docs that tells how to read it.
        work: what it costs the scheduler.
        cost: the same for people, such as "one gradient".
        arithmetic: the paper's.
        reads: where it looks.
        needs: what must be captured besides the activation.
        rectifies: whether the paper ends in a ReLU, so that negative evidence is dropped unless the caller says otherwise.
        has_target: whether the map depends on what it is asked about; a method that does not gives one map, about no class.
        variants: the arithmetic of libraries where it differs from the paper's.
        absent_from: profiles of libraries that do not have the method.
        contrast: how the target is turned into a contrast, by profile; None for most.
        fusion: how its layers are always brought together, whatever the spec says; None leaves it to the spec.
        parameters: names of the `Parameters` it reads, besides `allows_partial`.
        can_smooth_eigen: whether components may take the place of its sum over channels.
    """

    slug: str
    title: str
    paper: str
    family: Family
    work: WorkClass
    cost: str
    arithmetic: Arithmetic
    reads: Reads = Reads.LAYERS
    needs: frozenset[Need] = frozenset()
    rectifies: bool = False
    has_target: bool = True
    variants: Mapping[Profile, Arithmetic] = dataclasses.field(default_factory=dict)
    absent_from: frozenset[Profile] = frozenset()
    contrast: Mapping[Profile, Contrast] | None = None
    fusion: Fusion | None = None
    parameters: frozenset[str] = frozenset()
    can_smooth_eigen: bool = False

    def under(self, profile: Profile) -> Arithmetic:
        """The arithmetic under a profile's conventions.

        Raises:
            Unsupported: the library that the profile is named for has no such method.
        """
        if profile in self.absent_from:
            raise Unsupported(
                Reason.METHOD_NOT_IMPLEMENTED,
                f"profile {profile.value!r} has no {self.slug}: that library lacks it, or computes something else by that name; "
                "use profile 'paper'",
                metadata={"method": self.slug, "profile": profile.value},
            )
        return self.variants.get(profile, self.arithmetic)

    def rectifies_under(self, profile: Profile) -> bool:
        """Whether negative values are dropped by default; both libraries do so for every method but torchcam's plain CAM."""
        if profile is Profile.PYTORCH_GRAD_CAM and self.reads is not Reads.INPUT:
            return True
        return self.rectifies
