"""Source to served model: loads the program, lets the probe look at it, warms up, tests, and writes the card.

Called by `lifecycle.py` in a thread of its own, once for each load of a model version, while others serve; what has to run on the
device thread does so in pieces. Anything that does not fit is refused here, with the reason, rather than at the first request.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from camserve.server.engine.batches import make_batch
from camserve.server.engine.compiled import CompiledPlan
from camserve.server.engine.factories import load_factory
from camserve.server.engine.holdings import held_bytes
from camserve.server.engine.layout import LayoutKind
from camserve.server.engine.look import FAILURES, message_of
from camserve.server.engine.pace import ALL_THREADS, use_threads
from camserve.server.engine.passes import PassModel
from camserve.server.engine.probe import LayerReport, ProbeReport, probe
from camserve.server.engine.program import Program
from camserve.server.engine.script import load_script
from camserve.server.engine.turns import InTurn, at_once
from camserve.server.jobs import FloatArray, OutputKind
from camserve.server.models.archive_size import check_size
from camserve.server.models.card import ExtraInput, LayerCard, ModelCard, PlanCard
from camserve.server.models.config import ExtraConfig, read_phrases
from camserve.server.models.method_cards import method_cards
from camserve.server.models.presets import with_published_preset
from camserve.server.models.recipe import InputRecipe
from camserve.server.models.repository import ServedModel
from camserve.server.models.self_test import self_test
from camserve.server.models.sources import ModelSource
from camserve.server.models.warm_up import planned, usual_spec, warm_up

__all__ = ["load_model", "load_program"]

# Noise only shows shapes and dependencies; a fixed seed keeps load-time facts the same from start to start.
_PROBE_SEED = 0
_PROBE_ROWS = 2
_BEHIND_PATCHES = (
    "no score depends on any patch of it, so that every gradient there is zero: behind it the model reads other tokens only, "
    "such as the class token; methods without a gradient, such as eigen-cam and score-cam, give a map here"
)


def load_model(  # noqa: PLR0913 - each is a limit of its own.
    source: ModelSource,
    *,
    device: torch.device,
    max_batch_rows: int,
    max_maps: int = 128,
    slice_seconds: float | None = None,
    most_threads: int | None = None,
    max_archive_bytes: int | None = None,
    in_turn: InTurn = at_once,
) -> ServedModel:
    """Loads one version of one model.

    Args:
        source: where it is and what its card says.
        device: where it will run.
        max_batch_rows: the server's limit; the card and the probe may lower it.
        max_maps: the server's limit, for targets whose number of maps only the outputs tell.
        slice_seconds: longest chunk of amplified work, unless one row takes longer; None lets chunks be as large as passes.
        most_threads: of one pass on a CPU; 0 for all there are, None leaves their number as it is.
        max_archive_bytes: the server's limit for its file, packed and unpacked; None for none.
        in_turn: where the passes of the warm-up run.

    Raises:
        ValueError: the file, the card and the model do not fit together; the text says how.
        CamserveError: the program does not run, or nothing in it can be explained.
    """
    started = time.perf_counter()
    if most_threads is not None:
        use_threads(most_threads or ALL_THREADS)  # This thread may still have another model's number.
    config = with_published_preset(source.config)
    source = dataclasses.replace(source, config=config)
    if source.path is not None and max_archive_bytes is not None:
        check_size(source.path, max_archive_bytes)
    program = load_program(source, device)
    recipe = config.recipe()
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    noise = torch.randn((_PROBE_ROWS, *recipe.shape), generator=generator).to(program.device, program.dtype)
    extras = [_extra_noise(extra, generator, program) for extra in config.input.extra.values()]
    kind = config.output.kind
    report = probe(program, noise, extras=extras, output_path=config.output.path, output_kind=kind)
    _check_fit(source, report)
    rows = min(max_batch_rows, config.max_batch or max_batch_rows, report.max_batch or max_batch_rows)
    if recipe.is_variable:
        _check_other_size(source.name, program, [noise, *extras], report.static_batch)
    pass_model = PassModel(
        program=program,
        layouts=report.layouts,
        classes=report.classes,
        kind=kind,
        head=report.head,
        head_layer=report.head_layer,
        output_path=config.output.path,
        phrases=_phrases(source, report.classes),
        max_rows=rows,
        max_maps=max_maps,
        static_rows=report.static_batch,
        depths=_depths(report),
    )
    inputs = (noise, *extras)
    default_layer = config.default_layer or report.default_layer
    why_ordinary = ""
    if config.plan.compile:
        compiled, why_ordinary = _compiled(pass_model, default_layer, report, recipe, len(inputs))
        pass_model = dataclasses.replace(pass_model, compiled=compiled)
    pass_model, plan = planned(
        pass_model, inputs, _spellings(default_layer, report), most_threads=most_threads, in_turn=in_turn
    )
    methods = method_cards(pass_model, [make_batch(value, report.static_batch or 1) for value in inputs], report)
    spec = usual_spec(pass_model, default_layer, methods)
    warmed = warm_up(pass_model, inputs, spec, report.stages, slice_seconds=slice_seconds, in_turn=in_turn)
    pass_model = warmed.pass_model
    tested = self_test(pass_model, program, inputs, spec, default_layer)
    digests = program.digests()
    factory = config.factory
    notes = [*report.notes, tested]
    if recipe.is_variable:
        notes.append(f"takes inputs of other sizes too; those of maps are told for {recipe.shape}")
    if factory is not None and factory.random_seed is not None:
        notes.append(f"random weights, seed {factory.random_seed}: its answers mean nothing")
    if why_ordinary:
        notes.append(f"not compiled: {why_ordinary}")
    card = ModelCard(
        name=source.name,
        version=source.version,
        labels=config.labels,
        class_count=report.classes or len(config.labels),
        recipe=recipe,
        kind=program.kind.value,
        device=str(program.device),
        dtype=str(program.dtype).removeprefix("torch."),
        layers=tuple(_layer_card(layer, report) for layer in report.layers),
        default_layer=default_layer,
        methods=methods,
        weights_sha256=digests.weights,
        code_sha256=digests.code,
        model_sha256=hashlib.sha256(f"{digests.weights}{digests.code}".encode()).hexdigest(),
        max_batch_rows=rows,
        static_batch_rows=report.static_batch,
        rows_independent=report.rows_independent,
        warm_up_seconds=time.perf_counter() - started,
        notes=tuple(notes),
        output_kind=kind,
        stages=report.stages,
        phrases=tuple(pass_model.phrases),
        extra_inputs=tuple(
            ExtraInput(name=name, shape=extra.shape, dtype=extra.dtype) for name, extra in config.input.extra.items()
        ),
        memory_bytes=held_bytes(pass_model.program),
        plan=PlanCard(
            form=plan.name,
            speedup=plan.speedup,
            deviation=plan.deviation,
            threads=pass_model.pace.threads,
            chunk_rows=pass_model.pace.chunk_rows or rows,
        ),
    )
    return ServedModel(card=card, pass_model=pass_model, costs=warmed.costs)


def _compiled(
    model: PassModel, default_layer: str, report: ProbeReport, recipe: InputRecipe, inputs: int
) -> tuple[CompiledPlan | None, str]:
    """The plan that `compiling.py` fills with packages later, or why there can be none."""
    refusal = CompiledPlan.refusal(
        kind=model.kind, inputs=inputs, is_variable=recipe.is_variable, device=model.program.device.type
    )
    if refusal:
        return None, refusal
    # What loads packages takes seconds to import: here, where a starting server does not serve yet, and not beside passes.
    import torch._inductor  # noqa: F401, PLC0415

    spellings = next(layer.spellings for layer in report.layers if default_layer in (layer.name, *layer.spellings))
    return CompiledPlan(layer=default_layer, spellings=spellings, classes=report.classes), ""


def load_program(source: ModelSource, device: torch.device) -> Program:
    """Loads the program alone: no look at it, no card.

    Raises:
        ValueError: there is nothing to load, or a file of an unknown kind.
        CamserveError: it cannot be loaded.
    """
    config = source.config
    dtype = getattr(torch, config.precision)
    if config.factory is not None:
        return load_factory(
            config.factory.name,
            weights=source.path,
            random_seed=config.factory.random_seed,
            pretrained=config.factory.pretrained,
            allowed_imports=config.factory.allowed_imports,
            device=device,
            dtype=dtype,
        )
    if source.path is None:
        raise ValueError(f"model {source.name!r} has neither a file nor a factory")
    match source.path.suffix:
        case ".pt2":
            # Imported here: that takes as long as all the rest of torch, and most servers have no such archive.
            from camserve.server.engine.export import load_export  # noqa: PLC0415

            return load_export(source.path, device=device, dtype=dtype)
        case ".pt" | ".pth" | ".torchscript" | ".ts":
            return load_script(source.path, device=device, dtype=dtype)
        case suffix:
            raise ValueError(
                f"model file {source.path.name} has the ending {suffix!r}; served are .pt (TorchScript) and .pt2 (torch.export); "
                "weights alone need [factory] name in model.toml"
            )


def _spellings(layer: str, report: ProbeReport) -> Sequence[str]:
    """Every name of a layer, the given one first."""
    place = next((found for found in report.layers if layer in found.spellings), None)
    return [layer, *(name for name in place.spellings if name != layer)] if place else []


def _depths(report: ProbeReport) -> dict[str, int]:
    """How many stages lie behind each layer, itself included."""
    depths, behind = {}, 1
    for layer in reversed(report.layers):
        if layer.name in report.stages:
            behind = len(report.stages) - report.stages.index(layer.name)
        depths.update(dict.fromkeys(layer.spellings, behind))
    return depths


def _check_fit(source: ModelSource, report: ProbeReport) -> None:
    config = source.config
    # How many classes a detector tells apart its outputs do not say.
    is_counted = config.output.kind is not OutputKind.DETECTION
    if is_counted and report.classes == 0:
        raise ValueError(
            f"model {source.name!r} does not return what its kind of output, {config.output.kind}, is read from; "
            "set output.kind in model.toml if it is of another, output.path if it returns a dict or a tuple that holds it"
        )
    if is_counted and config.labels and len(config.labels) != report.classes:
        raise ValueError(
            f"model {source.name!r} has {report.classes} classes, but its card has {len(config.labels)} labels; "
            "write one label for each class, in order of class index, or none"
        )
    if config.default_layer and config.default_layer not in report.layouts:
        known = ", ".join(list(report.layouts)[:12])
        raise ValueError(
            f"default_layer {config.default_layer!r} gives no map in model {source.name!r}; layers: {known}"
        )
    if not config.default_layer and not report.default_layer:
        raise ValueError(
            f"no layer of model {source.name!r} gives a map: {'; '.join(report.notes) or 'none was found'}"
        )


def _layer_card(layer: LayerReport, report: ProbeReport) -> LayerCard:
    layout = layer.layout
    # Of tokens alone: a convolution that noise leaves without a gradient may have one for pictures.
    is_behind = layout is not None and layout.kind is LayoutKind.TOKENS and layer.has_gradient is False
    # Where no layer has any, as in front of an untrained head of zeros, that says nothing of this one.
    is_behind = is_behind and any(other.has_gradient for other in report.layers)
    return LayerCard(
        name=layer.name,
        spellings=layer.spellings,
        shape=layer.shape,
        layout=layout.kind.value if layout else "",
        map_shape=layout.grid if layout else (),
        refusal=layer.refusal,
        gradient_refusal=_BEHIND_PATCHES if is_behind else "",
    )


def _phrases(source: ModelSource, dimensions: int) -> Mapping[str, FloatArray]:
    """The phrases that text targets may name."""
    if not source.config.output.phrases:
        return {}
    return read_phrases(Path(source.config.output.phrases), dimensions)


def _check_other_size(name: str, program: Program, inputs: Sequence[Tensor], static_rows: int | None) -> None:
    """Refuses a card that promises what the model does not keep; a multiple of the size suits all strides and windows."""
    first, *extras = (make_batch(value, static_rows or 1) for value in inputs)
    larger = interpolate(first, scale_factor=2)
    try:
        program.run(larger, *extras)
    except FAILURES as error:
        raise ValueError(
            f"model {name!r} does not take inputs of other sizes: {tuple(larger.shape[1:])} failed with {message_of(error)}; "
            "leave input.variable out, or export it for sizes that vary"
        ) from error


def _extra_noise(extra: ExtraConfig, generator: torch.Generator, program: Program) -> Tensor:
    """Noise for a further input; ones where it takes whole numbers, which may be indices."""
    dtype = getattr(torch, extra.dtype)
    shape = (_PROBE_ROWS, *extra.shape)
    value = torch.randn(shape, generator=generator) if dtype.is_floating_point else torch.ones(shape)
    return value.to(program.device, program.dtype if dtype.is_floating_point else dtype)
