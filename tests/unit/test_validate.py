from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.cards import card, job, spec

from camserve.server import jobs
from camserve.server.cam.methods import METHODS
from camserve.server.errors import CamserveError, InvalidRequest, NotFound, Reason, Unsupported
from camserve.server.models.card import ExtraInput, MethodCard
from camserve.server.validate import RequestLimits, check_job, check_size

LIMITS = RequestLimits(max_specs=3, max_maps=6)
TENSOR = jobs.TensorInput(dtype="float32", shape=(3, 32, 32), data=b"")


def refusal(request: jobs.Job, model=None) -> CamserveError:
    """What a job is refused with."""
    with pytest.raises(CamserveError) as caught:
        check_job(request, card() if model is None else model, LIMITS)
    return caught.value


def about(what: jobs.About, **changes: Any) -> jobs.Spec:
    """Grad-CAM about that."""
    return spec(target=jobs.Target(about=what, **changes))


@pytest.mark.parametrize(
    "request_",
    [
        job(),
        job(top_k=4),
        job(*(spec(index) for index in range(3))),
        job(spec(layers=("stem", "body#0"))),
        job(about(jobs.ClassIndex(0))),
        job(about(jobs.ClassIndex(3))),
        job(about(jobs.KthClass(1))),
        job(about(jobs.KthClass(4))),
        job(about(jobs.TopClasses(4))),
        job(spec(encoding=jobs.Encoding.OVERLAY_PNG, size=jobs.MapSize.SOURCE)),
        job(spec(profile=jobs.Profile.TORCHCAM)),
        job(about(jobs.ClassesAbove(0.5))),
        job(about(jobs.Difference(0, 3, 0.5), score=jobs.Score.REST, polarity=jobs.Polarity.AGAINST)),
        job(spec(regions=jobs.RegionOptions(threshold=0.5))),
        job(spec(smoothing=jobs.Smoothing(augmentation=True))),
        job(spec(size=jobs.MapSize.INPUT), payload=TENSOR),
    ],
)
def test_what_the_model_can_do_passes(request_):
    """The ends of every range, any spelling of a layer, any rendering the input allows."""
    check_job(request_, card(), LIMITS)


SMALL = jobs.TensorInput(dtype="float32", shape=(2,), data=b"8 bytes.")
TWO_INPUTS = card(extra_inputs=(ExtraInput(name="mask", shape=(2,), dtype="float32"),))


def test_the_further_inputs_are_those_of_the_card():
    """Each of the card's, none besides, in its shape and with all its bytes."""
    check_job(job(extra_inputs={"mask": SMALL}), TWO_INPUTS, LIMITS)

    for sent, model, told in (
        ({}, TWO_INPUTS, "takes mask (float32 (2,)); sent: none"),
        ({"mask": SMALL, "more": SMALL}, TWO_INPUTS, "sent: mask, more"),
        ({"mask": SMALL}, card(), "takes no input besides the first; sent: mask"),
    ):
        error = refusal(job(extra_inputs=sent), model)
        assert (Reason.FIELD_INVALID, "extra_inputs") == (error.reason, error.field)
        assert told in error.message
    for changed in ({"shape": (1,)}, {"data": b"short"}):
        error = refusal(job(extra_inputs={"mask": dataclasses.replace(SMALL, **changed)}), TWO_INPUTS)
        assert (Reason.TENSOR_MISMATCH, "extra_inputs[mask]") == (error.reason, error.field)


def test_a_tensor_has_no_region_of_interest():
    """It is the model's whole input already."""
    region = jobs.Box(0, 0, 8, 8)
    check_job(job(region_of_interest=region), card(), LIMITS)

    assert "region_of_interest" == refusal(job(region_of_interest=region, payload=TENSOR)).field


def test_a_detector_lists_as_many_objects_as_asked_for():
    """Their number has nothing to do with its classes."""
    model = card(output_kind=jobs.OutputKind.DETECTION)
    check_job(job(top_k=100), model, LIMITS)

    assert "top_k" == refusal(job(top_k=0), model).field


@pytest.mark.parametrize(
    ("what", "maps", "changes"),
    [
        (jobs.ClassesAbove(0.5), 1, {}),
        (jobs.ClassesAbove(0.25), 3, {}),
        (jobs.ClassesAbove(0.0), 4, {}),
        (jobs.ClassesAbove(0.9), 4, {"output_kind": jobs.OutputKind.MULTI_LABEL}),
        (jobs.ClassesAbove(1.0), 1, {}),
        (jobs.TopClasses(3), 3, {}),
        (jobs.Steps((0, 1, 2)), 3, {"output_kind": jobs.OutputKind.SEQUENCE}),
        (jobs.Steps((), 1, 4), 4, {"output_kind": jobs.OutputKind.SEQUENCE}),
    ],
)
def test_maps_are_counted_before_they_are_made(what, maps, changes):
    """The most there can be: of a softmax at most one class is above a half, of independent classes all may be."""
    model = card(**changes)
    check_job(job(about(what)), model, RequestLimits(max_specs=1, max_maps=maps))

    with pytest.raises(InvalidRequest, match=f"may give {maps} maps") as caught:
        check_job(job(about(what)), model, RequestLimits(max_specs=1, max_maps=maps - 1))
    assert Reason.TOO_MANY_SPECS == caught.value.reason


def test_too_many_specs_are_told_by_their_number():
    """The count alone decides, so that they need not be read; the limit itself is allowed."""
    check_size(LIMITS.max_specs, LIMITS)

    with pytest.raises(InvalidRequest) as caught:
        check_size(LIMITS.max_specs + 1, LIMITS)

    assert (Reason.TOO_MANY_SPECS, "specs") == (caught.value.reason, caught.value.field)


@pytest.mark.parametrize(
    ("request_", "kind", "reason", "field"),
    [
        (job(*(about(jobs.TopClasses(4)),) * 2), InvalidRequest, Reason.TOO_MANY_SPECS, "specs"),
        (job(top_k=0), InvalidRequest, Reason.CLASS_OUT_OF_RANGE, "top_k"),
        (job(top_k=5), InvalidRequest, Reason.CLASS_OUT_OF_RANGE, "top_k"),
        (
            job(about(jobs.ClassIndex(-1))),
            InvalidRequest,
            Reason.CLASS_OUT_OF_RANGE,
            "specs[0].target.class_index",
        ),
        (
            job(about(jobs.ClassIndex(4))),
            InvalidRequest,
            Reason.CLASS_OUT_OF_RANGE,
            "specs[0].target.class_index",
        ),
        (job(about(jobs.KthClass(0))), InvalidRequest, Reason.CLASS_OUT_OF_RANGE, "specs[0].target.kth.k"),
        (job(about(jobs.KthClass(5))), InvalidRequest, Reason.CLASS_OUT_OF_RANGE, "specs[0].target.kth.k"),
        (job(about(jobs.TopClasses(0))), InvalidRequest, Reason.CLASS_OUT_OF_RANGE, "specs[0].target.top.k"),
        (job(about(jobs.TopClasses(5))), InvalidRequest, Reason.CLASS_OUT_OF_RANGE, "specs[0].target.top.k"),
        (job(spec(), spec(1, layers=("stem", "tail"))), NotFound, Reason.LAYER_NOT_FOUND, "specs[1].layers[1]"),
        (job(spec(layers=("head",))), Unsupported, Reason.LAYER_UNUSABLE, "specs[0].layers[0]"),
        (job(spec(layers=("body", "stem", "body"))), InvalidRequest, Reason.FIELD_INVALID, "specs[0].layers[2]"),
        (
            job(spec(encoding=jobs.Encoding.OVERLAY_JPEG), payload=TENSOR),
            InvalidRequest,
            Reason.FIELD_INVALID,
            "specs[0].encoding",
        ),
        (
            job(spec(size=jobs.MapSize.SOURCE), payload=TENSOR),
            InvalidRequest,
            Reason.FIELD_INVALID,
            "specs[0].size",
        ),
    ],
)
def test_what_the_model_cannot_do_is_refused_at_its_field(request_, kind, reason, field):
    """Class, reason and path tell what is wrong."""
    error = refusal(request_)

    assert (kind, reason, field) == (type(error), error.reason, error.field)


@pytest.mark.parametrize(
    ("method", "profile"),
    [(method.slug, profile) for method in METHODS.values() for profile in sorted(method.absent_from)],
)
def test_a_profile_without_the_method_is_refused(method, profile):
    """A library that does not offer a method has no conventions for it."""
    error = refusal(job(spec(method=method, profile=profile)))

    assert (Reason.FIELD_INVALID, "specs[0].profile") == (error.reason, error.field)
    assert method in error.message
    assert "use profile paper" in error.message


def test_a_missing_layer_gets_near_names_and_the_default():
    """A typing error is answered with what was meant."""
    error = refusal(job(spec(layers=("boddy",))))

    assert "near names: body" in error.message
    assert "default: body" in error.message
    assert {"layer": "boddy", "model": "tiny"} == dict(error.metadata)


def test_a_huge_layer_name_is_refused_at_once():
    """Looking for near names does not grow with what was sent."""
    error = refusal(job(spec(layers=("x" * 5_000_000,))))

    assert Reason.LAYER_NOT_FOUND == error.reason


def test_a_method_that_the_model_cannot_do_names_those_it_can():
    """The card's note says why, and what works instead."""
    methods = (
        MethodCard(slug="grad-cam", works=False, note="it has no derivative"),
        MethodCard(slug="eigen-cam", works=True),
    )

    error = refusal(job(spec()), card(methods=methods))

    assert (Reason.METHOD_UNSUPPORTED_BY_MODEL, "specs[0].method") == (error.reason, error.field)
    assert "it has no derivative" in error.message
    assert error.message.endswith("methods that do: eigen-cam")


def test_a_method_bound_to_a_layer_is_refused_elsewhere():
    """CAM works where the pooling feeds the head, under every spelling of that layer, and nowhere else."""
    model = card(methods=(MethodCard(slug="cam", works=True, note="at body", only_layers=("body", "body#0")),))

    check_job(job(spec(method="cam", layers=("body#0",))), model, LIMITS)
    error = refusal(job(spec(method="cam", layers=("stem",))), model)

    assert (Reason.METHOD_UNSUPPORTED_BY_MODEL, "specs[0].layers[0]") == (error.reason, error.field)


def test_the_input_is_not_looked_at():
    """Validation costs nothing that grows with the image: it never touches its bytes."""
    check_job(dataclasses.replace(job(spec()), payload=jobs.EncodedImage(data=None)), card(), LIMITS)
