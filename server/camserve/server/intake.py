"""What is done to a request before it queues: everything it carries decoded, everything it points at placed.

A `Job` and the model's card arrive; the `Sample`, and the job with its specs in terms of the model's input, leave. `pipeline.py`
calls it in the thread pool, or at once where `is_quickly_taken_in` says that the way there would take longer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from camserve.server import jobs
from camserve.server.decode import DecodeLimits, Region, decode
from camserve.server.encode import needs_source
from camserve.server.errors import CamserveError, InvalidRequest, Reason, at_field
from camserve.server.models.card import ModelCard
from camserve.server.placement import placed
from camserve.server.tensors import read_tensor

__all__ = ["is_quickly_taken_in", "take_in"]

# Checking and copying so many bytes of a tensor takes about 0.15 ms. A worker thread is reached and left in 0.07 ms when all is
# quiet, but under load both ends wait for the interpreter: 0.4 ms were measured.
_QUICK_BYTES: Final = 1 << 20
# Masks and reference images may be as large as photographs.
_PLACED: Final = (jobs.Region, jobs.DetectionBox, jobs.Reference)


def is_quickly_taken_in(job: jobs.Job) -> bool:
    """Whether `take_in` may run on the event loop: nothing but tensors to read, and few bytes of them; no target to be placed.

    Args:
        job: validated.
    """
    inputs = (job.payload, *job.extra_inputs.values())
    return (
        all(isinstance(value, jobs.TensorInput) for value in inputs)
        and sum(len(value.data) for value in inputs) <= _QUICK_BYTES
        and not any(isinstance(spec.target.about, _PLACED) for spec in job.specs)
    )


def take_in(job: jobs.Job, card: ModelCard, limits: DecodeLimits) -> tuple[jobs.Job, jobs.Sample]:
    """Decodes the input, further inputs and reference images, and places regions and boxes on the model's input.

    Args:
        job: validated.
        card: of its model.
        limits: of every input.

    Raises:
        InvalidRequest: with the field at fault; see `decode`, `read_tensor` and `placed`. What is wrong with the spec of a rule
            is kept with the rule instead.
    """
    with at_field(job.payload.FIELD):
        sample = decode(
            job.payload,
            card.recipe,
            limits,
            keep_source=any(needs_source(spec) for spec in job.specs),
            region=_region(job.region_of_interest),
        )
    extras = {}
    for extra in card.extra_inputs:
        with at_field(f"extra_inputs[{extra.name}]"):
            extras[extra.name] = read_tensor(job.extra_inputs[extra.name], extra)
    specs: list[jobs.Spec] = []
    obstacles: dict[int | None, CamserveError] = {}
    for spec in job.specs:
        try:
            with at_field(f"{job.path(spec.index)}.target"):
                specs.append(placed(_with_reference(spec, card, limits), sample.geometry, sample.tensor.shape))
        except CamserveError as error:
            if job.rule_of(spec.index) is None:
                raise
            # What a rule adds never fails the request: it is told if the rule's condition holds.
            specs.append(spec)
            obstacles[spec.index] = error
    sample = dataclasses.replace(sample, extras=extras) if extras else sample
    job = dataclasses.replace(job, specs=tuple(specs))
    return (_hindered(job, obstacles) if obstacles else job), sample


def _hindered(job: jobs.Job, obstacles: Mapping[int | None, CamserveError]) -> jobs.Job:
    """The job whose rules know that their specs cannot be made for this input."""
    uses = tuple(dataclasses.replace(use, obstacle=obstacles.get(use.spec_index, use.obstacle)) for use in job.rules)
    return dataclasses.replace(job, rules=uses)


def _region(box: jobs.Box | None) -> Region | None:
    if box is None:
        return None
    return Region(left=int(box.left), top=int(box.top), width=int(box.width), height=int(box.height))


def _with_reference(spec: jobs.Spec, card: ModelCard, limits: DecodeLimits) -> jobs.Spec:
    about = spec.target.about
    if not isinstance(about, jobs.Reference):
        return spec
    if card.extra_inputs:
        raise InvalidRequest(
            Reason.FIELD_INVALID,
            "a reference image cannot be embedded alone by a model with several inputs; send its embedding as a vector",
        )
    reference = decode(about.payload, card.recipe, limits, keep_source=False)
    target = dataclasses.replace(spec.target, about=jobs.ReferenceTensor(reference.tensor))
    return dataclasses.replace(spec, target=target)
