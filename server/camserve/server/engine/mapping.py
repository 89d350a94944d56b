"""Makes the maps of a pass from its activations and gradients.

`passes.py` builds one `Mapper` for a batch and asks it for one map after the other. Raw maps are computed where the activations
are, from one row or from the whole batch, as the method and the layer's size decide, never from a group whose size depends on who
asks. Only raw maps are copied to the host, where finishing them is cheaper than launching kernels for a few hundred cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from camserve.server.cam.maps import finish, finish_channels
from camserve.server.cam.methods import Family, Layerwise, Need, Whole
from camserve.server.cam.methods.numerics import widen
from camserve.server.engine.evidence import Differentiated, evidence_at, seen_attentions
from camserve.server.engine.graph import Chosen, is_device_failure
from camserve.server.engine.plan import Ask, PassModel, fresh
from camserve.server.engine.program import ATTENTION, TapName
from camserve.server.engine.readouts import Aim
from camserve.server.engine.stopwatch import Lap
from camserve.server.errors import CamserveError, ExecutionFailed, Reason
from camserve.server.jobs import MapFlag, Polarity, RawMap, ResolvedTarget, Saliency, SpecFailed

__all__ = ["Mapper", "class_weight", "failed", "finished_map"]


# Most values of a row's activation, 32 KiB in float32, for which the maps of a whole batch are computed at once on a CPU: for 16
# rows of so many, that took a fifth (Grad-CAM) to a half (Grad-CAM++) of what 16 maps take one by one, and 3 to 8 times one.
_SMALL_ROW = 8192


class Mapper:
    """The maps of one batch.

    Attributes:
        aims: each row's distinct aims by key, in order of rank.
        seconds: device time spent on maps so far.
    """

    def __init__(
        self,
        model: PassModel,
        activations: Mapping[TapName, Tensor],
        aims: Sequence[Mapping[Hashable, tuple[Ask, Aim]]],
    ) -> None:
        self._model = model
        self._activations = dict(activations)
        self.aims = aims
        self._ranks = [{key: rank for rank, key in enumerate(row)} for row in aims]
        # Whole-batch maps of the rank in progress; each serves every row that asks for the same.
        self._shared: dict[Hashable, Tensor] = {}
        self._failed: set[tuple[int, int]] = set()
        self.seconds = 0.0

    @property
    def rows(self) -> range:
        """The places of the batch."""
        return range(len(self.aims))

    def chosen(self, row: int, rank: int) -> Chosen:
        """A row's aim of a rank, and the output path it is about."""
        ask, aim = list(self.aims[row].values())[rank]
        return ask.spec.target.output_path, aim

    def ranks(self, ask: Ask) -> list[int]:
        """The rank of each of the ask's aims; specs that share an aim share its rank."""
        return [self._ranks[ask.row][ask.key(aim)] for aim in ask.aims]

    def has_failed(self, ask: Ask) -> bool:
        """Whether a map of this spec could not be made; no more are then."""
        return (ask.row, ask.spec.index) in self._failed

    def next_rank(self) -> None:
        """Forgets what was shared for the previous gradients."""
        self._shared.clear()

    def add(self, activations: Mapping[TapName, Tensor]) -> None:
        """Takes the activations of a further forward over the same batch, under another rule."""
        self._activations.update(activations)

    def fail(self, ask: Ask, error: CamserveError) -> SpecFailed:
        """Gives a spec up."""
        self._failed.add((ask.row, ask.spec.index))
        return failed(self._model, ask, error)

    def map(self, ask: Ask, aim: Aim, rank: int, found: Differentiated) -> RawMap | SpecFailed:
        """Makes one map.

        Args:
            ask: settled, not amplified.
            aim: one of its aims.
            rank: that aim's place among its row's.
            found: gradients of that rank; not looked at by methods that need none.

        Raises:
            RuntimeError: the device failed or its memory ran out.
        """
        try:
            with Lap(self._model.program.device) as lap:
                raw_maps = self._raw_maps(ask, rank, found)
                has_channels = isinstance(ask.arithmetic, Whole) and ask.arithmetic.has_channels
                result = finished_map(ask, aim.target, raw_maps, has_channels=has_channels)
            seconds = lap.seconds
        except CamserveError as error:
            return self.fail(ask, error)
        except RuntimeError as error:
            if is_device_failure(error):
                raise
            message = f"{ask.method.slug} failed on this row: {error}"
            return self.fail(ask, ExecutionFailed(Reason.MODEL_FAILED, message, metadata={"method": ask.method.slug}))
        self.seconds += seconds
        return dataclasses.replace(result, device_seconds=seconds)

    def _raw_maps(self, ask: Ask, rank: int, found: Differentiated) -> list[Tensor]:
        """(*space), or (c *input) for maps with channels, signed: one for each layer, or one alone."""
        groups = [(tap,) for tap in ask.taps] if isinstance(ask.arithmetic, Layerwise) else [self._read_taps(ask)]
        return [self._raw_map(ask, taps, rank, found) for taps in groups]

    def _raw_map(self, ask: Ask, taps: tuple[TapName, ...], rank: int, found: Differentiated) -> Tensor:
        if not self._is_for_whole_batch(ask, taps):
            return self._compute(ask, taps, rank, found, slice(ask.row, ask.row + 1))[0]
        key = (ask.arithmetic, taps, rank, ask.spec.parameters)
        if key not in self._shared:
            self._shared[key] = self._compute(ask, taps, rank, found, slice(None)).cpu()
        return self._shared[key][ask.row]

    def _is_for_whole_batch(self, ask: Ask, taps: tuple[TapName, ...]) -> bool:
        """Whether a raw map is computed for all rows at once: a matter of method, tap and model, not of who else is there."""
        if self._model.whole_batch_maps is not None:
            return self._model.whole_batch_maps
        if self._model.program.device.type != "cpu":
            return True
        if (
            not isinstance(ask.arithmetic, Layerwise)
            or ask.method.family is Family.COMPONENTS
            or ask.spec.smoothing.eigen
        ):
            return False  # Decompositions cost more than launching them does.
        activation = self._activations[taps[0]]
        return activation.numel() <= _SMALL_ROW * len(activation)

    def _read_taps(self, ask: Ask) -> tuple[TapName, ...]:
        """What a method that looks at everything at once looks at."""
        if ask.taps == (ATTENTION,):
            return tuple(seen_attentions(list(self._activations)))
        return ask.taps

    def _compute(self, ask: Ask, taps: Sequence[TapName], rank: int, found: Differentiated, rows: slice) -> Tensor:
        weight = self._class_weight(rank, rows) if Need.LINEAR_HEAD in ask.method.needs else None
        evidence = [
            evidence_at(self._model, ask, tap, self._activations, found, rows=rows, class_weight=weight) for tap in taps
        ]
        with torch.no_grad():
            if isinstance(ask.arithmetic, Layerwise):
                return ask.arithmetic.gather(ask.arithmetic.weigh(evidence[0]))
            if isinstance(ask.arithmetic, Whole):
                return ask.arithmetic.draw(evidence)
        raise ValueError(f"{ask.method.slug} is amplified and has no place in the shared pass")

    def _class_weight(self, rank: int, rows: slice) -> Tensor:
        """(b, c): the head's weights of each row's aim; rows without an aim of this rank get some class, and no map."""
        listed = [list(row.values()) for row in self.aims[rows]]
        return torch.cat([class_weight(self._model, row[rank][1] if rank < len(row) else None) for row in listed])


def class_weight(model: PassModel, aim: Aim | None) -> Tensor:
    """(1, c): the linear head's weights of what an aim is about, turned by its polarity."""
    if model.head is None:
        raise ValueError("a method that needs the linear head was let through without one")
    weight = model.head.weight
    terms = aim.weights if aim is not None and aim.weights else ((0, 1.0),)
    total = sum((factor * weight[index] for index, factor in terms[1:]), start=terms[0][1] * weight[terms[0][0]])
    if aim is not None and aim.target.polarity is Polarity.AGAINST:
        total = -total
    return total[None]


def finished_map(
    ask: Ask, target: ResolvedTarget, raw_maps: Sequence[Tensor], *, has_channels: bool, completed: float = 1.0
) -> RawMap:
    """Finishes the raw maps of one row: saliency of channels, rectification, fusion, normalisation, flags.

    Args:
        ask: whose.
        target: what the map is about.
        raw_maps: one for each layer, (*space); or one alone, (c *input) for maps with channels.
        has_channels: whether it is that.
        completed: share of an amplified method's work that was done.

    Raises:
        InvalidRequest: signed maps of several layers cannot be fused as asked.
    """
    on_host = [widen(values).cpu().numpy() for values in raw_maps]
    spec = ask.spec
    rectify = spec.rectify
    is_rectified = ask.method.rectifies_under(spec.profile) if rectify is None else rectify
    if has_channels:
        finished = finish_channels(
            on_host[0], spec.saliency, is_rectified=is_rectified, normalisation=spec.normalisation
        )
    else:
        finished = finish(
            on_host,
            is_rectified=is_rectified,
            normalisation=spec.normalisation,
            fusion=spec.fusion if ask.method.fusion is None else ask.method.fusion,
            profile=spec.profile,
        )
    flags = finished.flags | {MapFlag.PARTIAL} if completed < 1 else finished.flags
    return RawMap(
        spec_index=spec.index,
        target=target,
        values=finished.values,
        raw_min=finished.raw_min,
        raw_max=finished.raw_max,
        flags=flags,
        layers=tuple(str(tap) for tap in ask.taps) if ask.layouts else (),
        has_channels=has_channels and spec.saliency is Saliency.COLOUR,
        completed=completed,
    )


def failed(model: PassModel, ask: Ask, error: CamserveError) -> SpecFailed:
    """A spec that cannot be made, with an error of its own; where a gradient is missing it says for what, and of what program."""
    told = fresh(error)
    if told.reason is Reason.TARGET_NOT_DIFFERENTIABLE:
        told = fresh(
            error, f"{ask.method.slug} cannot be made here, model of kind {model.program.kind}: {error.message}"
        )
    return SpecFailed(spec_index=ask.spec.index, error=told)
