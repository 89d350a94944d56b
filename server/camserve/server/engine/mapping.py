"""Makes the maps of a pass from its activations and gradients.

`passes.py` builds one `Mapper` for a batch and asks it for one map after the other. Raw maps are computed where the activations
are, from one row on the CPU and from the whole batch elsewhere, never from a group whose size depends on who asks. Only raw maps
are copied to the host, where finishing them is cheaper than launching kernels for a few hundred cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from camserve.server.cam.maps import finish
from camserve.server.cam.methods import Compute, Need
from camserve.server.engine.layout import Layout, channels_first
from camserve.server.engine.plan import Ask, PassModel, fresh
from camserve.server.engine.program import TapName
from camserve.server.engine.stopwatch import Lap
from camserve.server.errors import CamserveError, ExecutionFailed, Reason, Unsupported
from camserve.server.jobs import RawMap, ResolvedTarget, SpecFailed

__all__ = ["Gradients", "Mapper", "is_device_failure"]

Gradients: TypeAlias = Mapping[TapName, Tensor | CamserveError | None]


def is_device_failure(error: RuntimeError) -> bool:
    """Tells running out of memory, and a broken device, from what concerns one map alone; the runner deals with those."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
        return True
    # The CPU allocator raises a plain RuntimeError.
    return "DefaultCPUAllocator" in str(error)


class Mapper:
    """The maps of one batch.

    Attributes:
        targets: each row's distinct targets by rank.
        seconds: device time spent on maps so far.
    """

    def __init__(
        self, model: PassModel, activations: Mapping[TapName, Tensor], targets: Sequence[Sequence[ResolvedTarget]]
    ) -> None:
        self._model = model
        self._activations = activations
        self.targets = targets
        chosen = model.whole_batch_maps
        self._is_whole_batch = model.program.device.type != "cpu" if chosen is None else chosen
        # Whole-batch maps of the rank in progress; each serves every row that asks for the same.
        self._shared: dict[tuple[Compute, TapName, int], Tensor] = {}
        self._failed: set[tuple[int, int]] = set()
        self.seconds = 0.0

    def ranks(self, ask: Ask) -> list[int]:
        """The rank of each of the ask's targets; specs that share a target share its rank."""
        known = [(target.class_index, target.score) for target in self.targets[ask.row]]
        return [known.index((target.class_index, target.score)) for target in ask.targets]

    def has_failed(self, ask: Ask) -> bool:
        """Whether a map of this spec could not be made; no more are then."""
        return (ask.row, ask.spec.index) in self._failed

    def next_rank(self) -> None:
        """Forgets what was shared for the previous gradients."""
        self._shared.clear()

    def map(self, ask: Ask, target: ResolvedTarget, rank: int, gradients: Gradients) -> RawMap | SpecFailed:
        """Makes one map.

        Args:
            ask: settled.
            target: one of its targets.
            rank: that target's place among its row's.
            gradients: of that rank, by tap; not looked at by methods that need none.

        Raises:
            RuntimeError: the device failed or its memory ran out.
        """
        try:
            with Lap(self._model.program.device) as lap:
                raw_maps = [self._raw_map(ask, place, rank, gradients) for place in range(len(ask.taps))]
                rectify = ask.spec.rectify
                finished = finish(
                    raw_maps,
                    is_rectified=ask.method.rectifies_under(ask.spec.profile) if rectify is None else rectify,
                    normalisation=ask.spec.normalisation,
                    fusion=ask.spec.fusion,
                    profile=ask.spec.profile,
                )
            seconds = lap.seconds
        except CamserveError as error:
            return self._fail(ask, error)
        except RuntimeError as error:
            if is_device_failure(error):
                raise
            message = f"{ask.method.slug} failed on this row: {error}"
            return self._fail(ask, ExecutionFailed(Reason.MODEL_FAILED, message, metadata={"method": ask.method.slug}))
        self.seconds += seconds
        return RawMap(
            spec_index=ask.spec.index,
            target=target,
            values=finished.values.numpy(),
            raw_min=finished.raw_min,
            raw_max=finished.raw_max,
            flags=finished.flags,
            layers=tuple(str(tap) for tap in ask.taps),
            device_seconds=seconds,
        )

    def _fail(self, ask: Ask, error: CamserveError) -> SpecFailed:
        self._failed.add((ask.row, ask.spec.index))
        return SpecFailed(spec_index=ask.spec.index, error=fresh(error))

    def _raw_map(self, ask: Ask, place: int, rank: int, gradients: Gradients) -> Tensor:
        """(*space) on the host, signed."""
        tap, layout = ask.taps[place], ask.layouts[place]
        if not self._is_whole_batch:
            only = slice(ask.row, ask.row + 1)
            return self._compute(ask, tap, layout, rank, gradients, only)[0]
        key = (ask.compute, tap, rank)
        if key not in self._shared:
            self._shared[key] = self._compute(ask, tap, layout, rank, gradients, slice(None)).cpu()
        return self._shared[key][ask.row]

    def _compute(self, ask: Ask, tap: TapName, layout: Layout, rank: int, gradients: Gradients, rows: slice) -> Tensor:
        activation = channels_first(self._activations[tap][rows], layout)
        gradient = None
        if ask.needs_gradient:
            gradient = channels_first(_differentiable(gradients, tap)[rows], layout)
        class_weight = self._class_weight(rank, rows) if Need.LINEAR_HEAD in ask.method.needs else None
        with torch.no_grad():
            return ask.compute(activation, gradient, class_weight)

    def _class_weight(self, rank: int, rows: slice) -> Tensor:
        """(b, c): the head's weights of each row's class; rows without a target of this rank get some class, and no map."""
        if self._model.head is None:
            raise ValueError("a method that needs the linear head was let through without one")
        classes = [targets[rank].class_index if rank < len(targets) else 0 for targets in self.targets[rows]]
        weight = self._model.head.weight
        return weight.index_select(0, torch.tensor(classes, device=weight.device))


def _differentiable(gradients: Gradients, tap: TapName) -> Tensor:
    gradient = gradients[tap]
    if isinstance(gradient, CamserveError):
        raise gradient
    if gradient is None:
        raise Unsupported(
            Reason.TARGET_NOT_DIFFERENTIABLE,
            f"the target does not depend on layer '{tap}': it is computed after the class scores or beside them; "
            "choose a layer before the scores",
            metadata={"layer": tap},
        )
    return gradient
