"""The compiled plan of a model: which requests ride it, and the packages that are live.

A package is the forward, the activation at the default layer and the gradient of one class's score there as one inference graph,
compiled for one number of rows; `compiled_build.py` makes it in another process. `models/compiling.py` adopts one after another
while the ordinary plan serves. `effort.py` asks `rides` on the event loop and `compiled_pass.py` on the device thread, which runs
the packages; both see what is live as one mapping that is replaced as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeAlias

from torch import Tensor

from camserve.server.cam.methods import Layerwise, Method, Need, Reads, find_method
from camserve.server.engine.program import TapName
from camserve.server.jobs import ClassIndex, OutputKind, Predicted, Score, Spec

__all__ = ["COMPILED", "LEAST_GAIN", "PREDICTED", "CompiledPlan", "LivePackage", "Package"]

COMPILED: Final = "compiled"
"""The form of the program under which the planner groups requests that ride."""

PREDICTED: Final = -1
"""Among the classes of a batch: the one with the largest output, lowest index first."""

LEAST_GAIN: Final = 1.05
"""A package that gains less over the ordinary plan, rows of padding counted, is not run: choices would follow the noise."""

Package: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
"""Takes (b *input) and classes (b), int64; gives outputs (b classes), activation and gradient (b ...), and the classes meant."""

_NEEDS = frozenset({Need.GRADIENT, Need.LINEAR_HEAD})
_KINDS = (OutputKind.CLASSIFICATION, OutputKind.MULTI_LABEL)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LivePackage:
    """A package that passed its trial.

    Attributes:
        rows: that it takes, neither more nor fewer.
        run: it.
        gain: how many times faster than the ordinary plan on as many rows.
    """

    rows: int
    run: Package
    gain: float


class CompiledPlan:
    """What of a model is compiled.

    Args:
        layer: the default one.
        spellings: every name of that layer.
        classes: that the model tells apart.
    """

    def __init__(self, *, layer: str, spellings: Iterable[str], classes: int) -> None:
        self.layer = TapName.parse(layer)
        self.taps: Mapping[str, TapName] = {name: TapName.parse(name) for name in {layer, *spellings}}
        self._classes = classes
        self._live: Mapping[int, LivePackage] = {}

    @staticmethod
    def refusal(*, kind: OutputKind, inputs: int, is_variable: bool, device: str) -> str:
        """Why a model cannot have one; empty if it can."""
        if kind not in _KINDS:
            return f"its kind of output is {kind.value}, and only {' and '.join(_KINDS)} are compiled"
        if inputs > 1:
            return f"it takes {inputs} inputs, and only models of one are compiled"
        if is_variable:
            return "it takes inputs of several sizes, and a compiled graph takes one"
        return "" if device == "cpu" else f"it runs on {device}, and only graphs for the CPU are compiled"

    @property
    def live(self) -> Mapping[int, LivePackage]:
        """The packages that serve, by rows."""
        return self._live

    def adopt(self, package: LivePackage) -> None:
        """Lets passes run it from now on."""
        self._live = dict(sorted({**self._live, package.rows: package}.items()))

    def package_for(self, rows: int) -> LivePackage | None:
        """The package that a pass of so many rows runs on, filled up; None where the ordinary plan is as fast."""
        package = next((package for size, package in self._live.items() if size >= rows), None)
        return package if package is not None and package.gain * rows / package.rows >= LEAST_GAIN else None

    def rides(self, specs: Sequence[Spec]) -> bool:
        """Whether a request can be answered from a package: also one that wants its prediction only."""
        return bool(self._live) and self.class_of(specs) is not None

    def class_of(self, specs: Sequence[Spec]) -> int | None:
        """The one class that is differentiated for a request, or `PREDICTED`; None if the request needs something else.

        Evidence against a class is the same gradient, its sign turned.
        """
        classes = set()
        for spec in specs:
            method = find_method(spec.method)
            if not self._reads_package(method, spec):
                return None
            if Need.GRADIENT in method.needs:
                classes.add(self._class_index(method, spec))
        if len(classes) > 1:
            return None
        return classes.pop() if classes else PREDICTED

    def _reads_package(self, method: Method, spec: Spec) -> bool:
        return (
            method.reads is Reads.LAYERS
            and method.needs <= _NEEDS
            and isinstance(method.under(spec.profile), Layerwise)
            and not spec.smoothing.augmentation
            and not spec.target.output_path
            and len(spec.layers) == 1
            and spec.layers[0] in self.taps
        )

    def _class_index(self, method: Method, spec: Spec) -> int | None:
        if method.contrast is not None or spec.target.score is not Score.LOGIT:
            return None
        match spec.target.about:
            case Predicted():
                return PREDICTED
            case ClassIndex(index) if 0 <= index < self._classes:
                return index
        return None
