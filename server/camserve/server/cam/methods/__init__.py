"""The table of methods. Adding one means adding to one of the family files beside this one, where its formula and paper stand.

What a method is made of: `method.py`. Who calls: `engine/` makes the maps, `validate.py`, the loader and the docs read the table.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from camserve.server.cam.methods.activation_only import ACTIVATION_ONLY
from camserve.server.cam.methods.attention import ATTENTION
from camserve.server.cam.methods.augmentation import augmented
from camserve.server.cam.methods.components import COMPONENTS, first_component
from camserve.server.cam.methods.concepts import CONCEPTS
from camserve.server.cam.methods.elementwise import ELEMENTWISE
from camserve.server.cam.methods.fullgrad import FULL_GRADIENT
from camserve.server.cam.methods.input_space import INPUT_SPACE
from camserve.server.cam.methods.method import (
    Amplified,
    Arithmetic,
    Contrast,
    Evidence,
    Family,
    Layerwise,
    Method,
    Need,
    Reads,
    Scene,
    Step,
    Whole,
    WorkClass,
)
from camserve.server.cam.methods.perturbation import PERTURBATION
from camserve.server.cam.methods.sampling import SAMPLING
from camserve.server.cam.methods.second_order import SECOND_ORDER
from camserve.server.cam.methods.weights import WEIGHTED
from camserve.server.errors import Reason, Unsupported

__all__ = [
    "METHODS",
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
    "augmented",
    "find_method",
    "first_component",
]

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.slug: method
        for method in (
            *WEIGHTED,
            *ELEMENTWISE,
            *SECOND_ORDER,
            *COMPONENTS,
            *ACTIVATION_ONLY,
            *CONCEPTS,
            *PERTURBATION,
            *SAMPLING,
            *INPUT_SPACE,
            *FULL_GRADIENT,
            *ATTENTION,
        )
    }
)


def find_method(text: str) -> Method:
    """Finds a method by its slug; case, hyphens, underscores and spaces do not matter, so `GradCAM++` is `grad-cam++`.

    Raises:
        Unsupported: there is none of that name; the message tells the nearest and all that exist.
    """
    wanted = _squeeze(text)
    if wanted in _SQUEEZED:
        return _SQUEEZED[wanted]
    near = difflib.get_close_matches(wanted, _SQUEEZED, n=1, cutoff=0.6)
    hint = f"; did you mean {_SQUEEZED[near[0]].slug!r}?" if near else ""
    raise Unsupported(
        Reason.METHOD_NOT_IMPLEMENTED,
        f"method {text!r} is not known{hint}; known methods: {', '.join(METHODS)}",
        metadata={"method": text, "known": ", ".join(METHODS)},
    )


def _squeeze(text: str) -> str:
    return text.casefold().translate(_MARKS)


_MARKS: Final = str.maketrans("", "", "-_ ")
_SQUEEZED: Final = {_squeeze(slug): method for slug, method in METHODS.items()}
