"""The trial of a package before it serves: it must explain noise as the ordinary plan does, and faster.

`models/compiling.py` takes its turns one by one on the device thread, so that passes of requests come in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from camserve.server.cam.methods import Evidence, Layerwise, find_method
from camserve.server.engine.alike import TOLERANCE, correlation, difference, least_correlation
from camserve.server.engine.batches import make_batch
from camserve.server.engine.compiled import LEAST_GAIN, PREDICTED, LivePackage, Package
from camserve.server.engine.compiled_build import explanation_of
from camserve.server.engine.layout import Layout, channels_first
from camserve.server.engine.pace import use_threads
from camserve.server.engine.plan import PassModel
from camserve.server.engine.program import TapName
from camserve.server.engine.stopwatch import Lap

__all__ = ["Trial", "trial_batch"]

# Noise with the spread of a normalised image.
_SEED = 0


class Trial:
    """One package against the ordinary plan, on as many rows as it takes.

    Call `check` once, then `race` a few times, each on the device thread; then read `refusal` and `live`.

    Args:
        model: as it serves.
        layer: that the package explains.
        package: to be tried.
        batch: (rows *input), in the model's dtype.

    Attributes:
        refusal: why the package must not serve; empty if it may. Complete after the last race.
        deviation: largest difference of an output, relative to the largest output.
    """

    def __init__(self, model: PassModel, layer: str, package: Package, batch: Tensor) -> None:
        self._threads = model.pace.threads
        self._program = model.program
        self._layout = model.layouts[layer]
        tap = TapName.parse(layer)
        self._ordinary = explanation_of(self._program, tap, kind=model.kind, output_path=model.output_path)
        self._package = package
        self._batch = batch
        # Predicted classes and named ones, whichever the package could mix up.
        self._classes = torch.tensor(
            [PREDICTED if row % 2 == 0 else row % model.classes for row in range(len(batch))], device=batch.device
        )
        self._seconds: tuple[list[float], list[float]] = ([], [])
        self._problem = ""
        self.deviation = 0.0

    def check(self) -> None:
        """Compares outputs, classes, activations, gradients and Grad-CAM maps."""
        use_threads(self._threads)
        expected = self._ordinary(self._batch, self._classes)
        found = self._package(self._batch, self._classes)
        self.deviation = difference(found[0], expected[0])
        allowed = TOLERANCE[self._program.dtype]
        if self.deviation > allowed:
            self._problem = f"its outputs differ by {self.deviation:.1e} of the largest, more than {allowed:.0e}"
            return
        if not torch.equal(found[3], expected[3]):
            self._problem = "it predicts other classes"
            return
        pairs = {
            "activations": (found[1], expected[1]),
            "gradients": (found[2], expected[2]),
            "maps": (_map(found, self._layout), _map(expected, self._layout)),
        }
        least = least_correlation(self._program.dtype)
        for what, (one, other) in pairs.items():
            # Row by row: one row that is wrong must not hide among many that are right.
            worst = min(map(correlation, one, other), default=1.0)
            if worst < least:
                self._problem = f"its {what} correlate by {worst:.4f} only, less than {least}"
                return

    def race(self) -> None:
        """Times one turn of each."""
        use_threads(self._threads)
        for run, into in zip((self._ordinary, self._package), self._seconds, strict=True):
            with Lap(self._program.device) as lap:
                run(self._batch, self._classes)
            into.append(lap.seconds)

    @property
    def gain(self) -> float:
        """Ratio of the shortest turns: what a noisy machine adds is left out."""
        return min(self._seconds[0]) / min(self._seconds[1])

    @property
    def refusal(self) -> str:
        """Why it must not serve."""
        if self._problem or self.gain >= LEAST_GAIN:
            return self._problem
        return f"it is {self.gain:.2f} times as fast as the ordinary plan, less than {LEAST_GAIN}"

    def live(self) -> LivePackage:
        """The package, for `CompiledPlan.adopt`."""
        return LivePackage(rows=len(self._batch), run=self._package, gain=self.gain)


def trial_batch(model: PassModel, shape: tuple[int, ...], rows: int) -> Tensor:
    """(rows *shape): noise, the same at every start."""
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(_SEED))
    return make_batch(noise.to(model.program.device, model.program.dtype), rows)


def _map(found: tuple[Tensor, Tensor, Tensor, Tensor], layout: Layout) -> Tensor:
    arithmetic = find_method("grad-cam").arithmetic
    if not isinstance(arithmetic, Layerwise):
        raise TypeError("Grad-CAM weighs the activation of one layer")
    activation, gradient = (channels_first(value, layout) for value in found[1:3])
    return arithmetic.gather(arithmetic.weigh(Evidence(activation=activation, gradient=gradient)))
