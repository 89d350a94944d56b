"""What a method would not read is refused at its field, whichever methods there are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from support.cards import card, spec

from camserve.server import jobs
from camserve.server.cam.methods import METHODS, Amplified, Layerwise, Reads, WorkClass
from camserve.server.errors import CamserveError, InvalidRequest, Reason
from camserve.server.method_rules import check_method, maps_for_each_target
from camserve.server.models.card import LayerCard

VALUES: dict[str, Any] = {
    "channels": 2,
    "samples": 2,
    "steps": 2,
    "noise": 0.5,
    "window": 2,
    "stride": 2,
    "concepts": 2,
    "similar_classes": 2,
    "contrast": 0.5,
    "seed": 7,
    "allows_partial": True,
}
ALL = [pytest.param(method, id=slug) for slug, method in METHODS.items()]


def asked(slug: str, **changes: Any) -> jobs.Spec:
    """A spec of the method, with layers if it reads any."""
    return spec(method=slug, layers=("body",) if METHODS[slug].reads is Reads.LAYERS else (), **changes)


def refusal(request: jobs.Spec, **changes: Any) -> CamserveError | None:
    """What a spec is refused with; None where it passes."""
    try:
        check_method(request, card(**changes), "specs[0]")
    except CamserveError as error:
        return error
    return None


def assert_refused(error: CamserveError | None, field: str) -> None:
    """It was, there."""
    assert (InvalidRequest, Reason.FIELD_INVALID, f"specs[0].{field}") == (
        type(error),
        error and error.reason,
        error and error.field,
    )


def test_every_parameter_is_tried_here():
    """One that is added to the vocabulary needs its line above."""
    assert {field.name for field in dataclasses.fields(jobs.Parameters)} == VALUES.keys()


@pytest.mark.parametrize("method", ALL)
def test_a_bare_spec_passes(method):
    """Whatever the method."""
    assert refusal(asked(method.slug)) is None


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("name", VALUES)
def test_parameters_are_taken_by_those_that_read_them(method, name):
    """The refusal tells those that the method reads; partial maps are for those that take many passes."""
    error = refusal(asked(method.slug, parameters=jobs.Parameters(**{name: VALUES[name]})))

    is_read = name in method.parameters or (name == "allows_partial" and method.work is WorkClass.AMPLIFIED)
    if is_read:
        assert error is None
        return
    assert_refused(error, f"parameters.{'allow_partial' if name == 'allows_partial' else name}")
    assert error is not None
    assert all(known in error.message for known in method.parameters)


@pytest.mark.parametrize("method", ALL)
def test_targets_are_taken_by_those_that_have_one(method):
    """A map about no class is not about another either, nor against it."""
    changed = (
        jobs.Target(about=jobs.ClassIndex(1)),
        jobs.Target(polarity=jobs.Polarity.AGAINST),
        jobs.Target(score=jobs.Score.SOFTMAX),
    )
    for target in changed:
        error = refusal(asked(method.slug, target=target))
        if method.has_target:
            assert error is None
        else:
            assert_refused(error, "target")


@pytest.mark.parametrize("method", ALL)
def test_layers_are_taken_by_those_that_read_them(method):
    """Others say where they look instead."""
    error = refusal(spec(method=method.slug, layers=("body",)))

    if method.reads is Reads.LAYERS:
        assert error is None
    else:
        assert_refused(error, "layers")


@pytest.mark.parametrize("method", ALL)
def test_smoothing_is_done_where_it_means_something(method):
    """Components replace a sum over channels; flips and scalings need maps made layer by layer."""
    by_parts = refusal(asked(method.slug, smoothing=jobs.Smoothing(eigen=True)))
    by_passes = refusal(asked(method.slug, smoothing=jobs.Smoothing(augmentation=True)))

    if method.can_smooth_eigen:
        assert by_parts is None
    else:
        assert_refused(by_parts, "smoothing.eigen")
    if isinstance(method.arithmetic, Layerwise):
        assert by_passes is None
    else:
        assert_refused(by_passes, "smoothing.augmentation")


@pytest.mark.parametrize("method", ALL)
def test_channels_are_brought_together_where_there_are_any(method):
    """Signed channels go as cells at their own size, without regions; without channels nothing of that holds."""
    has_channels = not isinstance(method.arithmetic, Layerwise) and method.arithmetic.has_channels
    gray = refusal(asked(method.slug, saliency=jobs.Saliency.GRAY))
    forms: tuple[tuple[str, dict[str, Any]], ...] = (
        ("encoding", {"encoding": jobs.Encoding.PNG8}),
        ("size", {"size": jobs.MapSize.INPUT}),
        ("regions", {"regions": jobs.RegionOptions(threshold=0.5)}),
    )

    if has_channels:
        assert gray is None
    else:
        assert_refused(gray, "saliency")
    for field, change in forms:
        error = refusal(asked(method.slug, **change))
        if has_channels:
            assert_refused(error, field)
            assert refusal(asked(method.slug, saliency=jobs.Saliency.GRAY, **change)) is None
        else:
            assert error is None


@pytest.mark.parametrize("method", ALL)
def test_maps_are_counted_as_the_method_gives_them(method):
    """One for each target, unless it draws concepts."""
    made = asked(method.slug, parameters=jobs.Parameters(concepts=5))
    draws = isinstance(method.arithmetic, Amplified) and method.arithmetic.maps is not None

    assert (5 if draws and "concepts" in method.parameters else 1) == maps_for_each_target(made)


def test_regions_are_found_in_pictures():
    """A signal's map has no boxes."""
    layers = (LayerCard(name="body", shape=(16, 8), layout="channels-first", map_shape=(8,)),)

    error = refusal(asked("grad-cam", regions=jobs.RegionOptions(threshold=0.5)), layers=layers)

    assert_refused(error, "regions")
    assert error is not None
    assert "a map of 1 dimensions" in error.message
