"""The work of one amplified spec: resumable, a chunk at a time.

`passes.py` makes one for each such spec once the targets are known. The runner then calls `advance` between passes, until
the work is done or nobody waits, or `finish_now` when the deadline is near and the caller takes what there is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from camserve.server.cam.methods import Amplified, Step
from camserve.server.engine.graph import is_device_failure
from camserve.server.engine.mapping import failed, finished_map
from camserve.server.engine.pace import use_threads
from camserve.server.engine.plan import Ask, PassModel
from camserve.server.engine.scene import RowScene
from camserve.server.engine.stopwatch import Lap
from camserve.server.errors import CamserveError, ExecutionFailed, Reason
from camserve.server.jobs import RawMap, SpecFailed

__all__ = ["Amplification"]


class Amplification:
    """One amplified spec of one row.

    Args:
        model: what runs.
        ask: settled.
        inputs: the row with a batch axis of one, and its further inputs; kept until the work is done.

    Attributes:
        row: place in the batch it came with.
        is_done: nothing is left to do.
        chunk_seconds: what the last chunk took; the next will take about as long.
    """

    def __init__(self, model: PassModel, ask: Ask, inputs: Sequence[Tensor]) -> None:
        if not isinstance(ask.arithmetic, Amplified):
            raise TypeError(f"{ask.method.slug} is not amplified")
        self.row = ask.row
        self.is_done = False
        self.chunk_seconds = 0.0
        self._model = model
        self._ask = ask
        self._arithmetic = ask.arithmetic
        self._inputs = tuple(inputs)
        self._rank = 0
        self._spent = 0.0
        self._maps: list[Tensor] = []
        self._layer = 0
        self._last: Step | None = None
        self._steps: Iterator[Step] = iter(())
        self._begin()

    @property
    def spec_index(self) -> int:
        """Which spec of its request."""
        return self._ask.spec.index

    @property
    def allows_partial(self) -> bool:
        """Whether the caller takes the best map so far."""
        return self._ask.spec.parameters.allows_partial

    def advance(self) -> list[RawMap | SpecFailed]:
        """Does one chunk; returns maps that became ready with it, or the spec's failure, after which it is done.

        Raises:
            RuntimeError: the device failed.
        """
        use_threads(self._model.pace.threads)
        try:
            with Lap(self._model.program.device) as lap, torch.no_grad():
                step = next(self._steps, None)
            self.chunk_seconds = lap.seconds
            self._spent += lap.seconds
            if step is not None:
                self._last = step
                if step.done < step.total:
                    return []
            return self._layer_is_done()
        except CamserveError as error:
            return self._give_up(error)
        except RuntimeError as error:
            if is_device_failure(error):
                raise
            message = f"{self._ask.method.slug} failed on this row: {error}"
            return self._give_up(
                ExecutionFailed(Reason.MODEL_FAILED, message, metadata={"method": self._ask.method.slug})
            )

    def finish_now(self) -> list[RawMap | SpecFailed]:
        """The best maps of what is done so far, flagged PARTIAL; for targets not yet begun there are none, so the spec fails."""
        try:
            if self._last is None and not self._maps:
                return self._give_up(
                    ExecutionFailed(
                        Reason.DEADLINE_EXCEEDED,
                        f"the deadline came before {self._ask.method.slug} had a map; give it longer or a smaller budget",
                        metadata={"method": self._ask.method.slug},
                    )
                )
            completed = self._completed()
            if self._last is not None:
                self._maps.append(self._drawn(self._last))
            results = self._results(completed)
        except CamserveError as error:
            return self._give_up(error)
        self._rank += 1
        if self._rank < len(self._ask.aims):
            results += self._give_up(
                ExecutionFailed(
                    Reason.DEADLINE_EXCEEDED,
                    f"the deadline came after {self._rank} of {len(self._ask.aims)} targets of {self._ask.method.slug}",
                    metadata={"method": self._ask.method.slug},
                )
            )
        self.close()
        return results

    def _begin(self) -> None:
        """Begins the aim of the present rank."""
        self._maps = []
        self._layer = 0
        self._begin_layer()

    def _begin_layer(self) -> None:
        aim = self._ask.aims[self._rank]
        scene = RowScene(self._model, self._ask, aim, self._inputs, self._layer)
        self._steps = _begun_later(self._arithmetic, scene)
        self._last = None

    def _layer_is_done(self) -> list[RawMap | SpecFailed]:
        if self._last is None:
            raise ValueError(f"{self._ask.method.slug} ended without a step")
        self._maps.append(self._drawn(self._last))
        self._layer += 1
        if self._layer < max(1, len(self._ask.layouts)):
            self._begin_layer()
            return []
        self._last = None
        results = self._results(completed=1.0)
        self._rank += 1
        if self._rank < len(self._ask.aims):
            self._begin()
        else:
            self.close()
        return results

    def _results(self, completed: float) -> list[RawMap | SpecFailed]:
        """The finished maps of the present aim: one, or as many as the method gives at once."""
        target = self._ask.aims[self._rank].target
        if self._arithmetic.maps is None:
            groups, targets = [self._maps], [target]
        else:
            count = len(self._maps[0])
            groups = [[values[place] for values in self._maps] for place in range(count)]
            targets = [dataclasses.replace(target, concept=place, rank=place, count=count) for place in range(count)]
        seconds, self._spent = self._spent / len(groups), 0.0
        return [
            dataclasses.replace(
                finished_map(self._ask, target, maps, has_channels=self._arithmetic.has_channels, completed=completed),
                device_seconds=seconds,
            )
            for target, maps in zip(targets, groups, strict=True)
        ]

    def _completed(self) -> float:
        layers = max(1, len(self._ask.layouts))
        present = self._last.done / self._last.total if self._last else 0.0
        return min((len(self._maps) + present) / layers, 1 - 1e-6)

    def _give_up(self, error: CamserveError) -> list[RawMap | SpecFailed]:
        self.close()
        return [failed(self._model, self._ask, error)]

    def close(self) -> None:
        """Lets go of everything that holds device memory."""
        self.is_done = True
        self._steps = iter(())
        self._inputs = ()
        self._maps = []
        self._last = None

    @staticmethod
    def _drawn(step: Step) -> Tensor:
        with torch.no_grad():
            return step.best().detach().cpu()


def _begun_later(arithmetic: Amplified, scene: RowScene) -> Iterator[Step]:
    """The steps, of which nothing is done before the first is asked for: some methods look at the layer to make them."""
    yield from arithmetic.steps(scene)
