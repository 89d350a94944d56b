"""ModelInferRequest to `Job`s, one for each row, and what is to be answered. The grammar; `validate.py` knows the model's limits.

Called by `inference.py`; raises with the path of the field at fault.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

from camserve.server import jobs
from camserve.server.errors import CamserveError, InvalidRequest, Reason, Unsupported
from camserve.server.method_rules import maps_for_each_target
from camserve.server.models.card import ModelCard
from camserve.server.oip.options import read_options
from camserve.server.oip.parameters import Value, unknown, values, whole
from camserve.server.oip.predictions import PREDICTIONS, takes_ranking
from camserve.server.oip.tensors import DATATYPES, Input, mismatch, read_inputs
from camserve.server.oip.terms import HEATMAP, Terms
from camserve.server.validate import RequestLimits, check_job, check_size

__all__ = [
    "IMAGE",
    "TENSOR",
    "Asked",
    "WantedHeatmap",
    "WantedPrediction",
    "all_predictions",
    "read_request",
]

TENSOR: Final = "input"
IMAGE: Final = "image"
# What else the protocol's clients send with every request; it says nothing to this server.
_IGNORED_OF_OUTPUT: Final = ("binary_data",)
# A detector lists all that it found.
_ALL: Final = 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WantedPrediction:
    """An output of the model's own.

    Attributes:
        name: of the output.
        best: how many classes to tell as texts; None for all as numbers.
    """

    name: str
    best: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WantedHeatmap:
    """An explanation.

    Attributes:
        name: of the output.
        spec: what it means.
        has_several: whether a row may have several maps, which then are an axis behind the batch's.
    """

    name: str
    spec: jobs.Spec
    has_several: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request, read.

    Attributes:
        terms: of the request.
        input_name: of the main input, for errors.
        outputs: what to answer, in the order asked for.
        jobs: one for each row.
    """

    terms: Terms
    input_name: str
    outputs: tuple[WantedPrediction | WantedHeatmap, ...]
    jobs: tuple[jobs.Job, ...]

    @property
    def predictions(self) -> tuple[WantedPrediction, ...]:
        """Outputs of the model's own."""
        return tuple(output for output in self.outputs if isinstance(output, WantedPrediction))

    @property
    def heatmaps(self) -> tuple[WantedHeatmap, ...]:
        """Explanations, in the order of their specs."""
        return tuple(output for output in self.outputs if isinstance(output, WantedHeatmap))

    def at_request(self, error: CamserveError, row: int | None = None) -> CamserveError:
        """The error in terms of what the caller wrote: outputs in place of specs, inputs by their names.

        Args:
            error: of a job.
            row: which one of several; None where it is about all.
        """
        field, message = error.field, error.message
        for wanted in self.heatmaps:
            spec, output = f"specs[{wanted.spec.index}]", f"outputs[{wanted.name}]"
            field, message = field.replace(spec, output), message.replace(spec, output)
        if field in _PAYLOADS:
            field = f"inputs[{self.input_name}]"
        field = field.replace("extra_inputs[", "inputs[")
        if row is not None and len(self.jobs) > 1:
            message = f"row {row}: {message}"
        return type(error)(
            error.reason,
            message,
            field=field,
            metadata=error.metadata,
            retry_after_seconds=error.retry_after_seconds,
        )


_PAYLOADS: Final = tuple(kind.FIELD for kind in (jobs.EncodedImage, jobs.RawFrame, jobs.TensorInput))


def read_request(
    request: Any,
    terms: Terms,
    card: ModelCard,
    limits: RequestLimits,
    *,
    received_at: float,
    deadline: float | None,
    caller: str,
) -> Asked:
    """Reads inputs and outputs.

    Args:
        request: a ModelInferRequest.
        terms: of it.
        card: of the model it names.
        limits: on specs and maps.
        received_at: monotonic seconds.
        deadline: gRPC's own, monotonic seconds; the request's timeout may shorten it.
        caller: who asks.

    Raises:
        CamserveError: something is missing or wrong, or more than the model or the server takes.
    """
    if terms.timeout_seconds is not None:
        until = received_at + terms.timeout_seconds
        deadline = until if deadline is None else min(until, deadline)
    outputs = _outputs(request, terms, card, limits)
    inputs = read_inputs(request)
    main, payloads = _payloads(inputs, card)
    extras = _extras(inputs, card, len(payloads))
    asked = Asked(
        terms=terms,
        input_name=main.name,
        outputs=outputs,
        jobs=tuple(
            jobs.Job(
                request_id=terms.request_id,
                model=card.name,
                version=card.version,
                payload=payload,
                specs=tuple(output.spec for output in outputs if isinstance(output, WantedHeatmap)),
                top_k=_ALL if card.output_kind is jobs.OutputKind.DETECTION else 1,
                received_at=received_at,
                deadline=deadline,
                caller=caller,
                extra_inputs=extra,
                lane=terms.lane,
            )
            for payload, extra in zip(payloads, extras, strict=True)
        ),
    )
    try:
        # Rows differ in their values only.
        check_job(asked.jobs[0], card, limits)
    except CamserveError as error:
        raise asked.at_request(error) from None
    return asked


def all_predictions(card: ModelCard) -> tuple[WantedPrediction, ...]:
    """Every output of the model's own."""
    return tuple(WantedPrediction(name=name) for name in PREDICTIONS[card.output_kind])


def _outputs(
    request: Any, terms: Terms, card: ModelCard, limits: RequestLimits
) -> tuple[WantedPrediction | WantedHeatmap, ...]:
    known = PREDICTIONS[card.output_kind]
    if not request.outputs:
        return all_predictions(card)
    check_size(sum(output.name.startswith(HEATMAP) for output in request.outputs), limits)
    wanted: dict[str, WantedPrediction | WantedHeatmap] = {}
    specs = 0
    for output in request.outputs:
        name, field = output.name, f"outputs[{output.name}]"
        if name in wanted:
            raise InvalidRequest(Reason.FIELD_INVALID, f"{field} is asked for twice", field=field)
        given = values(output.parameters, f"{field}.parameters")
        if any(option.startswith("shared_memory_") for option in given):
            raise Unsupported(
                Reason.FEATURE_NOT_IMPLEMENTED,
                f"{field} is wanted in shared memory, which this server does not write; leave those parameters out",
                field=field,
            )
        given = {option: value for option, value in given.items() if option not in _IGNORED_OF_OUTPUT}
        if name.startswith(HEATMAP):
            options = {**terms.defaults, **terms.of_outputs.get(name, {}), **given}
            wanted[name] = _heatmap(specs, name, options, card)
            specs += 1
        elif name in known:
            wanted[name] = WantedPrediction(name=name, best=_best(given, field, card))
        else:
            raise unknown("output", name, (*known, HEATMAP), field)
    return tuple(wanted.values())


def _heatmap(index: int, name: str, options: Mapping[str, Value], card: ModelCard) -> WantedHeatmap:
    spec = dataclasses.replace(read_options(index, name, options, card), may_compress=False)
    several = (jobs.TopClasses, jobs.ClassesAbove, jobs.Steps)
    has_several = isinstance(spec.target.about, several) or maps_for_each_target(spec) > 1
    return WantedHeatmap(name=name, spec=spec, has_several=has_several)


def _best(given: Mapping[str, Value], field: str, card: ModelCard) -> int | None:
    for option in given:
        if option != "classification":
            raise unknown("parameter", option, ("classification",), f"{field}.parameters[{option}]")
    count = whole(given.get("classification", 0), f"{field}.parameters[classification]")
    if count < 0 or (count and not takes_ranking(card.output_kind)):
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            f"{field}.parameters[classification] is {count}; ask for 1 or more best classes, of a model that gives classes",
            field=f"{field}.parameters[classification]",
        )
    return count or None


def _payloads(inputs: Mapping[str, Input], card: ModelCard) -> tuple[Input, list[jobs.JobInput]]:
    """The main input, and what each row is to be shown."""
    further = {extra.name for extra in card.extra_inputs}
    names = [name for name in _main_names(card) if name not in further]
    mains = [given for name, given in inputs.items() if name not in further]
    for given in mains:
        if given.name not in names:
            raise unknown("input", given.name, (*names, *further), given.field)
    if len(mains) != 1:
        said = "send one of them, not both" if mains else "nothing to look at was sent"
        raise InvalidRequest(
            Reason.FIELD_INVALID, f"inputs: {said}; model {card.name!r} takes {' or '.join(names)}", field="inputs"
        )
    (main,) = mains
    payloads = _pictures(main) if main.datatype == "BYTES" or main.name == IMAGE else _tensors(main, card)
    if len(payloads) > card.max_batch_rows:
        raise mismatch(
            main,
            f"has {len(payloads)} rows; model {card.name!r} takes at most {card.max_batch_rows} in one request: "
            "send several, and they are batched",
        )
    return main, payloads


def _main_names(card: ModelCard) -> tuple[str, ...]:
    return (TENSOR, IMAGE) if card.recipe.takes_images else (TENSOR,)


def _pictures(main: Input) -> list[jobs.JobInput]:
    """Image files, or pixels as a camera gives them."""
    if main.datatype == "BYTES":
        if len(main.shape) > 2 or (len(main.shape) == 2 and main.shape[1] != 1):
            raise mismatch(main, "has the wrong shape; send image files as [N] or [N, 1]")
        return [jobs.EncodedImage(data=element) for element in main.elements]
    if main.datatype != "UINT8":
        raise mismatch(
            main, f"is no picture; send files as BYTES, pixels as UINT8, or what the model takes as {TENSOR!r}"
        )
    rows = main.rows(3)
    height, width, channels = main.shape[-3:]
    if channels not in (1, 3):
        raise mismatch(main, "has the wrong shape; send pixels as [N, height, width, 3] in RGB, or with 1 in gray")
    pixel_format = jobs.PixelFormat.RGB8 if channels == 3 else jobs.PixelFormat.MONO8
    return [
        jobs.RawFrame(pixel_format=pixel_format, width=width, height=height, stride=width * channels, data=row)
        for row in rows
    ]


def _tensors(main: Input, card: ModelCard) -> list[jobs.JobInput]:
    rank = len(card.recipe.shape)
    rows = main.rows(rank)
    return [jobs.TensorInput(dtype=DATATYPES[main.datatype], shape=main.shape[-rank:], data=row) for row in rows]


def _extras(inputs: Mapping[str, Input], card: ModelCard, rows: int) -> Sequence[Mapping[str, jobs.TensorInput]]:
    """Further inputs of each row."""
    found: list[dict[str, jobs.TensorInput]] = [{} for _ in range(rows)]
    for extra in card.extra_inputs:
        given = inputs.get(extra.name)
        if given is None:
            continue  # `check_job` tells what the model takes.
        if given.datatype == "BYTES":
            raise mismatch(given, f"is no tensor; send one of {', '.join(DATATYPES)}")
        rank = len(extra.shape)
        data = given.rows(rank)
        if len(data) != rows:
            raise mismatch(given, f"has {len(data)} rows, the main input {rows}; send as many of each")
        for row, taken in zip(found, data, strict=True):
            row[extra.name] = jobs.TensorInput(
                dtype=DATATYPES[given.datatype], shape=given.shape[-rank:] if rank else (), data=taken
            )
    return found
