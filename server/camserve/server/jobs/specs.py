"""What is asked: a `Spec` for each explanation, and the `Job` that carries them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from camserve.server.jobs.inputs import Box, JobInput, TensorInput
from camserve.server.jobs.rules import RuleUse
from camserve.server.jobs.targets import Target
from camserve.server.jobs.words import Encoding, Fusion, Lane, MapSize, Normalisation, Profile, Saliency

__all__ = ["Job", "Parameters", "RegionOptions", "Smoothing", "Spec"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """How a method is tuned and what it may spend; None takes the method's own default, which its docstring tells.

    Attributes:
        channels: most channels to score, those of the largest mean gradient first.
        samples: noisy copies, masks or coalitions.
        steps: of an integral.
        noise: standard deviation of noise, as a share of the input's range.
        window: side of an occluding patch or of a pooling window, in cells of what it moves over.
        stride: of the patch.
        concepts: how many concept maps.
        similar_classes: how many of the nearest classes Finer-CAM compares with.
        contrast: weight of those classes.
        seed: of every random choice.
        allows_partial: send the best map so far when the deadline comes.
    """

    channels: int | None = None
    samples: int | None = None
    steps: int | None = None
    noise: float | None = None
    window: int | None = None
    stride: int | None = None
    concepts: int | None = None
    similar_classes: int | None = None
    contrast: float | None = None
    seed: int = 0
    allows_partial: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Smoothing:
    """Averages that make a map calmer.

    Attributes:
        augmentation: the mean over flips and scalings of the input; six passes for one.
        eigen: the first principal component of the weighted activations in place of their sum.
    """

    augmentation: bool = False
    eigen: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RegionOptions:
    """Boxes around the strongest evidence.

    Attributes:
        threshold: share of the map's largest value that a region's cells reach, above 0, at most 1.
        max_regions: the strongest so many; None sends all.
    """

    threshold: float
    max_regions: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One requested explanation.

    Attributes:
        index: its place in the request.
        method: slug of a method in `cam.METHODS`.
        layers: tap names as the caller wrote them, or the card's default; none for methods that read no layers.
        target: what is asked about.
        profile: whose conventions to follow.
        fusion: how several layers become one map.
        rectify: keep positive evidence only; None takes what the method's paper does.
        normalisation: applied after rectification.
        size: resolution of what is sent.
        encoding: how it is sent.
        overlay_opacity: 0 to 1, weight of the map's colours in an overlay.
        parameters: of the method.
        smoothing: by more passes, or by components.
        saliency: how channels are sent, for methods in input space.
        regions: boxes wanted beside the map, or None.
        may_compress: whether cells may be compressed on top of their encoding.
    """

    index: int
    method: str
    layers: tuple[str, ...]
    target: Target = dataclasses.field(default_factory=Target)
    profile: Profile = Profile.PAPER
    fusion: Fusion = Fusion.MEAN
    rectify: bool | None = None
    normalisation: Normalisation = Normalisation.NONE
    size: MapSize = MapSize.LAYER
    encoding: Encoding = Encoding.UINT8
    overlay_opacity: float = 0.5
    parameters: Parameters = Parameters()
    smoothing: Smoothing = Smoothing()
    saliency: Saliency = Saliency.COLOUR
    regions: RegionOptions | None = None
    may_compress: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One validated request.

    Attributes:
        request_id: the caller's, or ours.
        model: name in the repository.
        version: resolved, never empty.
        payload: the image, frame or tensor, still undecoded.
        specs: what to explain; empty for a prediction only.
        top_k: how many classes the prediction lists.
        labels: the caller's own strings, for the record.
        received_at: monotonic seconds.
        deadline: monotonic seconds after which nobody waits, or None.
        caller: who asked, for fairness and the access record.
        extra_inputs: further inputs by name, for models that take several.
        region_of_interest: the part of the source to look at; None for all of it.
        lane: how urgent it is.
        rules: what each rule of the model means for this request; the specs they add stand behind the caller's.
    """

    request_id: str
    model: str
    version: str
    payload: JobInput
    specs: tuple[Spec, ...]
    top_k: int
    received_at: float
    deadline: float | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    caller: str = ""
    extra_inputs: Mapping[str, TensorInput] = dataclasses.field(default_factory=dict)
    region_of_interest: Box | None = None
    lane: Lane = Lane.STANDARD
    rules: tuple[RuleUse, ...] = ()

    @property
    def asked(self) -> tuple[Spec, ...]:
        """The caller's own specs."""
        added = {use.spec_index for use in self.rules}
        return tuple(spec for spec in self.specs if spec.index not in added) if added else self.specs

    def rule_of(self, spec_index: int) -> RuleUse | None:
        """The rule that added a spec; None for one of the caller's."""
        return next((use for use in self.rules if use.spec_index == spec_index), None)

    def path(self, spec_index: int) -> str:
        """Where a spec stands, for errors: `specs[2]` of the request, or `rules[rejects]` of the card."""
        use = self.rule_of(spec_index)
        return f"specs[{spec_index}]" if use is None else f"rules[{use.name}]"
