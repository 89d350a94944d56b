from __future__ import annotations

import pytest

from camserve.client.bench.kinds import parse_kind, parse_settings


def test_a_kind_may_have_several_specs_layers_and_a_weight() -> None:
    """Specs are joined by commas, layers by plus signs, and the plus signs of a method's name are its own."""
    made = parse_kind("grad-cam++@layer2+layer3,eigen-cam=2.5", ["layer4"], {"encoding": "float32"})

    assert ("grad-cam++@layer2+layer3,eigen-cam", 2.5) == (made.name, made.weight)
    assert [("grad-cam++", ("layer2", "layer3")), ("eigen-cam", ("layer4",))] == [
        (spec.method, spec.layers) for spec in made.specs
    ]
    assert {"float32"} == {spec.encoding for spec in made.specs}


def test_prediction_asks_for_no_explanation() -> None:
    """Explaining one request in ten is a mix like another."""
    made = parse_kind("prediction=9", ["layer4"], {})

    assert ((), 9.0) == (made.specs, made.weight)


@pytest.mark.parametrize(
    "text", ["grad-cam=0", "grad-cam=-1", "grad-cam=often", "grad-cam=inf", "grad-cam=nan", "grad-cam="]
)
def test_what_is_no_weight(text: str) -> None:
    """The refusal shows how to write one."""
    with pytest.raises(ValueError, match="is no weight; write METHOD"):
        parse_kind(text, [], {})


@pytest.mark.parametrize("text", ["grad-kam", "", "grad-cam,"])
def test_what_is_no_method(text: str) -> None:
    """The refusal lists those that exist."""
    with pytest.raises(ValueError, match="unknown method"):
        parse_kind(text, [], {})


def test_settings_are_read_by_the_type_of_their_field() -> None:
    """Any field of a spec can be set; a class by its index or its label."""
    texts = ["samples=500", "noise=0.25", "rectify=no", "target=3", "encoding=png8", "allow-partial=true"]

    found = parse_settings(texts)

    expected = {"samples": 500, "noise": 0.25, "rectify": False, "target": 3, "encoding": "png8", "allow_partial": True}
    assert expected == found
    assert {"target": "scratch"} == parse_settings(["target=scratch"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("samples", "sets nothing"),
        ("method=cam", "sets nothing"),
        ("colour=red", "sets nothing"),
        ("samples=many", "is no value of samples"),
        ("rectify=perhaps", "is no value of rectify"),
    ],
)
def test_settings_that_are_none(text: str, told: str) -> None:
    """What cannot be set is told before anything is sent."""
    with pytest.raises(ValueError, match=told):
        parse_settings([text])
