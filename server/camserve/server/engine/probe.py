"""The look at a program right after loading: what can be tapped, how it is laid out, which batches it takes.

Arrives: any `Program` and a sample of its input. Leaves: a `ProbeReport`, from which the loader writes the model card and builds
the `PassModel`. Works through the protocol alone, in about ten small forwards.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from camserve.server.engine.batches import coupling, make_batch, try_sizes
from camserve.server.engine.default_layer import best_name, choose_default, choose_stages
from camserve.server.engine.head import LinearHead, find_linear_head
from camserve.server.engine.layout import Layout, channels_first, detect_layout
from camserve.server.engine.look import FAILURES, Seen, find_scores, look
from camserve.server.engine.program import Call, Program, TapName
from camserve.server.engine.stopwatch import Lap
from camserve.server.errors import CamserveError
from camserve.server.jobs import OutputKind

__all__ = ["LayerReport", "LinearHead", "ProbeReport", "find_linear_head", "probe"]

_NO_INFLUENCE = "the class scores depend on no layer that can be mapped; an untrained head of zeros does this"
_NOTHING_FOUND = "the detector found nothing in noise, so that it is not known which layers its scores depend on"
_TAPS_CHANGE = "tapping every layer moves the class scores in their last bits or more; check maps of single layers"

_Shapes: TypeAlias = Mapping[TapName, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One place that can be tapped, or the reason why not.

    Attributes:
        name: `layer4` where the module is called once, `layer4.1.relu#0` for each of several calls.
        spellings: every name that means this place, `name` among them: the bare path is a module's last call.
        shape: of one row, as the model lays it out; empty if it could not be captured.
        layout: how to read it as a map; None if that is unknown.
        has_gradient: whether the model's scores depend on its map at all; None if the program has no derivative, or no score.
        refusal: why no map can be made here; empty when one can.
    """

    name: str
    spellings: tuple[str, ...]
    shape: tuple[int, ...] = ()
    layout: Layout | None = None
    has_gradient: bool | None = None
    refusal: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What was learnt.

    Attributes:
        layers: every call, in order of execution.
        default_layer: where to look when nobody says; empty if no layer will do.
        stages: a layer for each resolution, in order of execution, the default among them.
        batch_sizes: those tried that work.
        static_batch: the only size that works, or None if several do.
        rows_independent: a row's output has the same bits whatever its neighbours are.
        max_batch: 1 if rows are not independent, the static size if there is one, None if nothing forbids more.
        differentiable: gradients reach back from the scores.
        differentiable_reason: why they do not, and what to do about it; empty if they do.
        head: the linear head behind average pooling, or None.
        head_layer: the layer it averages; empty without a head.
        classes: channels of the output: classes, values or dimensions; 0 if it has another shape, and for detectors, which do
            not show theirs.
        warm_up_seconds: what the probe's first forward of each batch size took, all together.
        notes: sentences for the model card.
    """

    layers: tuple[LayerReport, ...]
    default_layer: str
    stages: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    static_batch: int | None
    rows_independent: bool
    max_batch: int | None
    differentiable: bool
    differentiable_reason: str
    head: LinearHead | None
    head_layer: str
    classes: int
    warm_up_seconds: float
    notes: tuple[str, ...] = ()

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """The layout at every layer where a map can be made, under each of its spellings."""
        return {name: layer.layout for layer in self.layers if layer.layout for name in layer.spellings}


def probe(
    program: Program,
    sample_input: Tensor,
    *,
    extras: Sequence[Tensor] = (),
    batch_sizes: Sequence[int] = (1, 2, 3),
    output_path: str = "",
    output_kind: OutputKind = OutputKind.CLASSIFICATION,
) -> ProbeReport:
    """Looks at a program.

    Args:
        program: freshly loaded.
        sample_input: (n, c, *space) on the program's device and in its dtype; noise does. More rows are made from these.
        extras: the same for further inputs; they keep their size when the first is resized.
        batch_sizes: tried, besides n. If none works, usual sizes up to 64 are.
        output_path: where the scores are in the output; see `readouts.select_output`.
        output_kind: what they are.

    Raises:
        ExecutionFailed: the program does not run on the sample at any batch size, there is no output of that kind at that path,
            or nothing it returns is floating.
    """
    samples = (sample_input, *extras)
    with Lap(program.device) as lap:
        wanted = {sample_input.shape[0], *batch_sizes}
        runs = try_sizes(program, samples, wanted, output_kind, output_path)
    sizes = tuple(runs)
    rows = next((size for size in sizes if size > 1), sizes[0])
    influence = coupling(program, samples, rows, runs[rows], output_kind, output_path)
    static_batch = sizes[0] if len(sizes) == 1 else None

    calls = program.calls()
    taps = [
        TapName(call.path, call.index, key) for call in calls if not call.refusal for key in call.outputs or (None,)
    ]
    inputs = [make_batch(sample, rows) for sample in samples]
    seen = look(program, taps, inputs, output_path, output_kind)
    has_changed = not torch.equal(seen.scores, find_scores(runs[rows], output_path, output_kind))
    layouts, refusals = _read_layouts(program, seen, inputs, min(sizes))
    reaches = {tap: _reaches(seen, tap, layout) for tap, layout in layouts.items()}

    has_influence = any(reached is not False for reached in reaches.values())
    classes = _channels(seen.scores, output_kind)
    choice = (calls, layouts, reaches if has_influence else {}, seen.values, classes if seen.scores.ndim > 2 else 0)
    is_detector = output_kind is OutputKind.DETECTION
    default = choose_default(*choice, is_detector=is_detector)
    head, head_tap = _find_head(program, seen, layouts)
    notes = (
        influence,
        seen.no_gradient,
        "" if has_influence else _NO_INFLUENCE,
        _TAPS_CHANGE if has_changed and not influence else "",
        "" if seen.scores.numel() else _NOTHING_FOUND,
    )
    if head_tap is not None:
        head_tap = best_name(head_tap, calls, seen.values)
    return ProbeReport(
        layers=tuple(_layer_reports(calls, seen, layouts, reaches, refusals)),
        default_layer=_spellings(default, calls)[0] if default else "",
        stages=tuple(_spellings(tap, calls)[0] for tap in choose_stages(*choice, is_detector=is_detector)),
        batch_sizes=sizes,
        static_batch=static_batch,
        rows_independent=not influence,
        max_batch=1 if influence else static_batch,
        differentiable=not seen.no_gradient,
        differentiable_reason=seen.no_gradient,
        head=head,
        head_layer=_spellings(head_tap, calls)[0] if head_tap else "",
        classes=0 if output_kind is OutputKind.CLASSIFICATION and seen.scores.ndim != 2 else classes,
        warm_up_seconds=lap.seconds,
        notes=tuple(note for note in notes if note),
    )


def _channels(scores: Tensor, kind: OutputKind) -> int:
    """Classes of what is differentiated, whether or not it has the shape it should; 0 for detections."""
    if scores.ndim < 2:
        return 0
    return scores.shape[-1 if kind is OutputKind.SEQUENCE else 1]


def _read_layouts(
    program: Program, seen: Seen, samples: Sequence[Tensor], smallest_batch: int
) -> tuple[dict[TapName, Layout], dict[TapName, str]]:
    """Reads the layout of every captured layer; maps first, since their grids tell what token counts stand for."""
    inputs, *extras = samples
    shapes = {tap: tuple(value.shape) for tap, value in seen.values.items()}
    sequences = {tap for tap, shape in shapes.items() if len(shape) == 3 and inputs.ndim > 3}
    token_counts = _token_counts([shapes[tap] for tap in sequences], inputs.shape[0])
    resized = _resized(inputs[:smallest_batch])
    others = [resized, *(extra[:smallest_batch] for extra in extras)]
    elsewhere = _shapes_at(program, list(shapes), others)
    has_cuts = not elsewhere
    has_own_size = bool(elsewhere) and all(elsewhere[tap][1:] == shape[1:] for tap, shape in shapes.items())
    layouts: dict[TapName, Layout] = {}
    refusals: dict[TapName, str] = {}
    grids: set[tuple[int, ...]] = set()
    for tap in sorted(shapes, key=lambda tap: tap in sequences):
        other = (elsewhere[tap], resized.shape) if tap in elsewhere else None
        try:
            layouts[tap] = detect_layout(
                shapes[tap],
                inputs.shape,
                other=other,
                token_counts=token_counts,
                grids=grids,
                has_own_size=has_own_size,
            )
        except CamserveError as error:
            refusals[tap] = error.message
        is_map = len(shapes[tap]) == inputs.ndim
        if tap in refusals and other is None and has_cuts and is_map:
            # A head of fixed size refuses other inputs, but the layers before it need not.
            shape, has_cuts = _shape_before_head(program, tap, others)
            if shape:
                layouts[tap] = detect_layout(shapes[tap], inputs.shape, other=(shape, resized.shape))
                del refusals[tap]
        if tap in layouts and tap not in sequences:
            grids.add(layouts[tap].grid)
    return {tap: layouts[tap] for tap in shapes if tap in layouts}, refusals


def _token_counts(shapes: Sequence[tuple[int, ...]], rows: int) -> set[int]:
    """Sequence lengths: second axes that several widths have in common."""
    widths = collections.defaultdict(set)
    for shape in shapes:
        if shape[0] == rows:
            widths[shape[1]].add(shape[2])
    return {count for count, found in widths.items() if len(found) > 1}


def _resized(inputs: Tensor) -> Tensor:
    """The same batch at another size, (b, c, *space): about half, in multiples of 32 so that down- and upsampling fit."""
    space = inputs.shape[2:]
    halves = [32 * math.ceil(extent / 64) for extent in space]
    sizes = [half if half < extent else 2 * extent for half, extent in zip(halves, space, strict=True)]
    return interpolate(inputs, size=sizes) if sizes else inputs


def _shapes_at(program: Program, taps: Sequence[TapName], inputs: Sequence[Tensor]) -> _Shapes:
    """Shapes at every tap for another input; none if the program does not take it."""
    try:
        return {tap: tuple(value.shape) for tap, value in program.capture(taps, *inputs).activations.items()}
    except FAILURES:
        return {}


def _shape_before_head(program: Program, tap: TapName, inputs: Sequence[Tensor]) -> tuple[tuple[int, ...], bool]:
    """Runs only up to a tap; returns its shape, and whether it is worth trying another one."""
    try:
        activation, _ = program.cut(tap).front(*inputs)
    except FAILURES:
        return (), False
    return tuple(activation.shape), True


def _reaches(seen: Seen, tap: TapName, layout: Layout) -> bool | None:
    """Whether the scores depend on any cell of the map; prefix tokens do not count."""
    if tap not in seen.gradients and (seen.no_gradient or not seen.scores.numel()):
        return None
    gradient = seen.gradients.get(tap)
    return gradient is not None and bool(channels_first(gradient, layout).any())


def _find_head(
    program: Program, seen: Seen, layouts: Mapping[TapName, Layout]
) -> tuple[LinearHead | None, TapName | None]:
    """Looks for a linear head behind each layer, last one first."""
    tensors = program.tensors()
    for tap, layout in reversed(list(layouts.items())):
        if math.prod(layout.grid) > 1:
            head = find_linear_head(tensors, channels_first(seen.values[tap], layout), seen.scores)
            if head is not None:
                return head, tap
    return None, None


def _spellings(tap: TapName, calls: Sequence[Call]) -> list[str]:
    """Every name of one place, the card's first."""
    count = sum(call.path == tap.path for call in calls)
    named, bare = str(tap), str(dataclasses.replace(tap, call=None))
    if count == 1:
        return [bare, named]
    return [named, bare] if tap.call == count - 1 else [named]


def _layer_reports(
    calls: Sequence[Call],
    seen: Seen,
    layouts: Mapping[TapName, Layout],
    reaches: Mapping[TapName, bool | None],
    refusals: Mapping[TapName, str],
) -> list[LayerReport]:
    reports = []
    for call in calls:
        for key in call.outputs or (None,):
            tap = TapName(call.path, call.index, key)
            spellings = tuple(_spellings(tap, calls))
            value = seen.values.get(tap)
            reports.append(
                LayerReport(
                    name=spellings[0],
                    spellings=spellings,
                    shape=() if value is None else tuple(value.shape[1:]),
                    layout=layouts.get(tap),
                    has_gradient=reaches.get(tap),
                    refusal=call.refusal or seen.refusals.get(tap, "") or refusals.get(tap, ""),
                )
            )
    return reports
