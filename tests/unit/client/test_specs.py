from __future__ import annotations

import pytest

from camserve.client import Spec
from camserve.client.specs import to_protos
from camserve.client.words import METHODS
from camserve.v1 import spec_pb2


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("grad-cam", "METHOD_GRAD_CAM"),
        ("GradCAM", "METHOD_GRAD_CAM"),
        ("grad-cam++", "METHOD_GRAD_CAM_PLUS_PLUS"),
        ("gradcamplusplus", "METHOD_GRAD_CAM_PLUS_PLUS"),
        ("xgrad-cam", "METHOD_XGRAD_CAM"),
        ("hirescam", "METHOD_HIRES_CAM"),
        ("HiRes-CAM", "METHOD_HIRES_CAM"),
        ("layercam", "METHOD_LAYER_CAM"),
        ("eigen_cam", "METHOD_EIGEN_CAM"),
        ("cam", "METHOD_CAM"),
        ("Smooth Grad-CAM++", "METHOD_SMOOTH_GRAD_CAM_PLUS_PLUS"),
    ],
)
def test_method_names_are_read_whatever_their_case_and_hyphens(word: str, name: str) -> None:
    """People write method names in many ways and mean one."""
    assert spec_pb2.Method.Value(name) == Spec(word).to_proto().method


def test_every_method_of_the_contract_has_a_word_that_leads_back_to_it() -> None:
    """Also those not built yet can be asked for, so that the server can say so."""
    for name, number in spec_pb2.Method.items():
        if number:
            assert name == METHODS.name(METHODS.word(number))


def test_wrong_words_are_answered_with_the_nearest_and_the_whole_list() -> None:
    """A misspelt method never leaves the client."""
    with pytest.raises(ValueError, match=r"unknown method 'gradcm'; did you mean 'grad-cam'\? Known: cam, grad-cam"):
        Spec("gradcm")
    with pytest.raises(ValueError, match=r"unknown encoding 'pdf'\. Known: float32"):
        Spec("cam", encoding="pdf")


def test_every_option_reaches_the_message() -> None:
    """Nothing that was written down is dropped."""
    spec = Spec(
        "layercam",
        layers=["layer1", "layer2"],
        target=3,
        score="softmax",
        polarity="against",
        profile="pytorch-grad-cam",
        fusion="max",
        rectify=False,
        normalisation="min-max",
        size="source",
        encoding="overlay-png",
        overlay_opacity=0.25,
        saliency="gray",
        output_path="aux.logits",
        region_threshold=0.5,
        max_regions=3,
        augmentation_smooth=True,
        eigen_smooth=True,
        channels=1,
        samples=2,
        steps=3,
        noise=0.5,
        window=5,
        stride=6,
        concepts=7,
        similar_classes=8,
        contrast=0.75,
        seed=0,
        allow_partial=True,
    )
    expected = spec_pb2.Spec(
        method="METHOD_LAYER_CAM",
        layers=["layer1", "layer2"],
        target=spec_pb2.Target(
            class_index=3, score="SCORE_SOFTMAX", polarity="POLARITY_AGAINST", output_path="aux.logits"
        ),
        profile="PROFILE_PYTORCH_GRAD_CAM",
        fusion="FUSION_MAX",
        rectify=False,
        normalisation="NORMALISATION_MIN_MAX",
        size="MAP_SIZE_SOURCE",
        encoding="ENCODING_OVERLAY_PNG",
        overlay_opacity=0.25,
        saliency="SALIENCY_GRAY",
        regions=spec_pb2.RegionOptions(threshold=0.5, max_regions=3),
        smoothing=spec_pb2.Smoothing(augmentation=True, eigen=True),
        parameters=spec_pb2.Parameters(
            channels=1,
            samples=2,
            steps=3,
            noise=0.5,
            window=5,
            stride=6,
            concepts=7,
            similar_classes=8,
            contrast=0.75,
            seed=0,
            allow_partial=True,
        ),
    )

    assert expected == spec.to_proto()
    # Whatever the contract adds has to be added above, or is a choice.
    for message in (expected, expected.smoothing, expected.parameters, expected.regions):
        assert {field.name for field in message.DESCRIPTOR.fields} == {field.name for field, _ in message.ListFields()}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"region_threshold": 0}, "region_threshold is 0"),
        ({"region_threshold": 1.5}, "region_threshold is 1.5"),
        ({"max_regions": 2}, "needs a region_threshold"),
        ({"region_threshold": 0.5, "max_regions": 0}, "max_regions is 0"),
        ({"overlay_opacity": -1}, "overlay_opacity is -1"),
    ],
)
def test_numbers_that_cannot_be_are_told_where_they_are_written(fields: dict[str, float], told: str) -> None:
    """Before anything is sent."""
    with pytest.raises(ValueError, match=told):
        Spec("cam", **fields)


def test_choices_left_open_stay_unset() -> None:
    """The server's defaults are the server's business."""
    expected = spec_pb2.Spec(method="METHOD_CAM", target=spec_pb2.Target(predicted=spec_pb2.PredictedClass()))

    assert expected == Spec("cam").to_proto()


def test_names_specs_and_messages_may_be_mixed() -> None:
    """A plain name is a spec; a message passes through for options that have no friendly form."""
    message = spec_pb2.Spec(method="METHOD_CAM", smoothing=spec_pb2.Smoothing(eigen=True))

    assert [Spec("grad-cam").to_proto(), Spec("cam").to_proto(), message] == to_protos(
        ["grad-cam", Spec("cam"), message]
    )
    assert [Spec("grad-cam").to_proto()] == to_protos("grad-cam")
    with pytest.raises(TypeError, match="not int"):
        to_protos([7])  # type: ignore[list-item]


def test_one_layer_may_be_given_as_a_string() -> None:
    """A string is never taken apart into letters."""
    assert ("layer2",) == Spec("cam", layers="layer2").layers
