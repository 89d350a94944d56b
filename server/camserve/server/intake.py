"""What is done to a request off the event loop before it queues: everything it carries decoded, everything it points at placed.

A `Job` and the model's card arrive; the `Sample`, and the job with its specs in terms of the model's input, leave. `pipeline.py`
calls it in the thread pool.
"""

from __future__ import annotations

import dataclasses

from camserve.server import jobs
from camserve.server.decode import DecodeLimits, Region, decode
from camserve.server.encode import needs_source
from camserve.server.errors import InvalidRequest, Reason, at_field
from camserve.server.models.card import ModelCard
from camserve.server.placement import placed
from camserve.server.tensors import read_tensor

__all__ = ["take_in"]


def take_in(job: jobs.Job, card: ModelCard, limits: DecodeLimits) -> tuple[jobs.Job, jobs.Sample]:
    """Decodes the input, further inputs and reference images, and places regions and boxes on the model's input.

    Args:
        job: validated.
        card: of its model.
        limits: of every input.

    Raises:
        InvalidRequest: with the field at fault; see `decode`, `read_tensor` and `placed`.
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
    specs = []
    for spec in job.specs:
        with at_field(f"specs[{spec.index}].target"):
            specs.append(placed(_with_reference(spec, card, limits), sample.geometry, sample.tensor.shape))
    return dataclasses.replace(job, specs=tuple(specs)), dataclasses.replace(sample, extras=extras)


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
