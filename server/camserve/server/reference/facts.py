"""What is told of one method, read off its line of the table and the docstrings of its arithmetic.

`command.py` and `page.py` show it. `DEFAULTS` alone is written by hand, since a default may be a rule rather than a number; a
test holds the numbers to what the methods do.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from camserve.server.cam.methods import METHODS, Arithmetic, Layerwise, Method, Reads, Whole, WorkClass
from camserve.server.jobs import Parameters, Profile

__all__ = ["CLASSES", "DEFAULTS", "READS", "MethodFacts", "ParameterFacts", "ProfileFacts", "facts_of"]

CLASSES: Mapping[WorkClass, str] = MappingProxyType(
    {
        WorkClass.FORWARD_ONLY: "a forward",
        WorkClass.ONE_GRADIENT: "a forward and a gradient, shared with the batch",
        WorkClass.AMPLIFIED: "many passes over one row, in turn with other requests",
    }
)
READS: Mapping[Reads, str] = MappingProxyType(
    {
        Reads.LAYERS: "layers",
        Reads.INPUT: "the input",
        Reads.BIASES: "the input and every bias",
        Reads.ATTENTION: "every attention",
    }
)
DEFAULTS: Mapping[tuple[str, str], int | float | str] = MappingProxyType(
    {
        ("ablation-cam", "channels"): "all that are not zero everywhere",
        ("deep-feature-factorisation", "concepts"): 5,
        ("finer-cam", "contrast"): 0.6,
        ("finer-cam", "similar_classes"): 3,
        ("integrated-gradients", "steps"): 50,
        ("is-cam", "channels"): "all that vary",
        ("is-cam", "steps"): 10,
        ("occlusion", "stride"): "half the window",
        ("occlusion", "window"): "an eighth of the input's shorter side",
        ("random-cam", "seed"): 0,
        ("rise", "samples"): 1000,
        ("rise", "seed"): 0,
        ("score-cam", "channels"): "all that vary",
        ("seg-xres-cam", "window"): 2,
        ("sess", "stride"): "the input's own size",
        ("smooth-grad-cam++", "noise"): 0.15,
        ("smooth-grad-cam++", "samples"): 25,
        ("smooth-grad-cam++", "seed"): 0,
        ("smoothgrad", "noise"): 0.15,
        ("smoothgrad", "samples"): 25,
        ("smoothgrad", "seed"): 0,
        ("ss-cam", "channels"): "all that vary",
        ("ss-cam", "noise"): 2.0,
        ("ss-cam", "samples"): 35,
        ("ss-cam", "seed"): 0,
    }
)
"""By method and parameter: what is taken when a spec leaves it out, under the paper's conventions."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParameterFacts:
    """A parameter that a method reads: its name in a spec, its default, and what it is."""

    name: str
    default: int | float | str
    meaning: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProfileFacts:
    """What a library's conventions do to a method.

    Attributes:
        profile: whose.
        is_offered: whether the library has the method.
        differs: whether its maps differ from the paper's.
        told: how; empty where they do not.
    """

    profile: str
    is_offered: bool
    differs: bool
    told: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MethodFacts:
    """All that is told of a method; fields are those of `Method` in words."""

    slug: str
    title: str
    family: str
    work: str
    cost: str
    reads: str
    needs: tuple[str, ...]
    paper: str
    arithmetic: str
    rectifies: bool
    has_target: bool
    has_channels: bool
    can_smooth_eigen: bool
    can_augment: bool
    parameters: tuple[ParameterFacts, ...]
    profiles: tuple[ProfileFacts, ...]


def facts_of(method: Method) -> MethodFacts:
    """Reads a method's line of the table."""
    return MethodFacts(
        slug=method.slug,
        title=method.title,
        family=method.family.value,
        work=method.work.value,
        cost=method.cost,
        reads=method.reads.value,
        needs=tuple(sorted(need.value for need in method.needs)),
        paper=method.paper,
        arithmetic=_docstring(method.arithmetic),
        rectifies=method.rectifies,
        has_target=method.has_target,
        has_channels=_has_channels(method.arithmetic),
        can_smooth_eigen=method.can_smooth_eigen,
        can_augment=isinstance(method.arithmetic, Layerwise),
        parameters=_parameters(method),
        profiles=tuple(_profile(method, profile) for profile in Profile if profile is not Profile.PAPER),
    )


def _has_channels(arithmetic: Arithmetic) -> bool:
    return not isinstance(arithmetic, Layerwise) and arithmetic.has_channels


def _parameters(method: Method) -> tuple[ParameterFacts, ...]:
    names = [field.name for field in dataclasses.fields(Parameters) if field.name in method.parameters]
    told = [ParameterFacts(name=name, default=DEFAULTS[method.slug, name], meaning=_meanings()[name]) for name in names]
    if method.work is WorkClass.AMPLIFIED:
        told.append(ParameterFacts(name="allow_partial", default="no", meaning=_meanings()["allows_partial"]))
    return tuple(told)


@functools.cache
def _meanings() -> Mapping[str, str]:
    """By parameter, what the docstring of `Parameters` says of it."""
    told: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(Parameters.__doc__ or "").partition("Attributes:\n")[2].split("\n"):
        if line.startswith("    ") and not line.startswith("     "):
            name, _, rest = line.strip().partition(": ")
            told[name] = rest
        elif name:
            told[name] += " " + line.strip()
    return {key: value.strip().removesuffix(".") for key, value in told.items()}


def _profile(method: Method, profile: Profile) -> ProfileFacts:
    if profile in method.absent_from:
        return ProfileFacts(
            profile=profile.value,
            is_offered=False,
            differs=True,
            told="refused: the library lacks it, or computes something else by that name",
        )
    told = []
    if profile in method.variants:
        variant = _docstring(method.variants[profile])
        is_same = variant in ("", _docstring(method.arithmetic))
        told.append("The same formula with that library's details, which tests hold it to." if is_same else variant)
    if method.rectifies_under(profile) != method.rectifies:
        told.append("Keeps positive values only." if method.rectifies_under(profile) else "Keeps negative values.")
    if method.contrast is not None and method.contrast[profile] != method.contrast[Profile.PAPER]:
        contrast = method.contrast[profile]
        weighed = ", weighed by their probabilities" if contrast.by_probability else ""
        told.append(f"Contrast {contrast.weight:g} with {contrast.classes} classes{weighed}.")
    return ProfileFacts(profile=profile.value, is_offered=True, differs=bool(told), told=" ".join(told))


def _docstring(arithmetic: Arithmetic) -> str:
    """What the function that does the arithmetic says of it; empty where the paper's equation says it all."""
    function: Callable[..., Any]
    if isinstance(arithmetic, Layerwise):
        is_plain = arithmetic.gather is METHODS["grad-cam"].arithmetic.gather  # type: ignore[union-attr]
        told = _told_by(arithmetic.weigh)
        return told if is_plain else " ".join(filter(None, [told, _told_by(arithmetic.gather)]))
    function = arithmetic.draw if isinstance(arithmetic, Whole) else arithmetic.steps
    return _told_by(function)


def _told_by(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    made_by, is_local, _ = function.__qualname__.partition(".<locals>")
    told = function.__doc__ or (getattr(sys.modules[function.__module__], made_by).__doc__ if is_local else "") or ""
    return inspect.cleandoc(told).partition("\n\nArgs:")[0].partition("\n\nRaises:")[0].strip()
