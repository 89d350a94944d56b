"""Targets against cards: each kind of output has its own, and what a card tells bounds them."""

from __future__ import annotations

import dataclasses
import typing

import pytest
from support.cards import card

from camserve.server import jobs
from camserve.server.errors import CamserveError, InvalidRequest, NotFound, Reason, Unsupported
from camserve.server.jobs import OutputKind
from camserve.server.models.card import ModelCard
from camserve.server.target_rules import check_target

BOX = jobs.Box(0, 0, 4, 4)
ASKED: dict[str, jobs.About] = {
    "predicted": jobs.Predicted(),
    "class_index": jobs.ClassIndex(3),
    "kth": jobs.KthClass(4),
    "top": jobs.TopClasses(2),
    "above": jobs.ClassesAbove(0.5),
    "difference": jobs.Difference(0, 3),
    "region": jobs.Region(3, BOX),
    "detection": jobs.DetectionBox(BOX, 3),
    "embedding": jobs.Embedding((0.0, 1.0, 0.0, 0.0)),
    "text": jobs.Phrase("a crane"),
    "steps": jobs.Steps((3,)),
}
HAS = {
    OutputKind.CLASSIFICATION: {"predicted", "class_index", "kth", "top", "above", "difference"},
    OutputKind.MULTI_LABEL: {"predicted", "class_index", "kth", "top", "above", "difference"},
    OutputKind.REGRESSION: {"predicted", "class_index", "kth", "top", "difference"},
    OutputKind.SEGMENTATION: {"predicted", "class_index", "kth", "top", "above", "difference", "region"},
    OutputKind.DETECTION: {"predicted", "class_index", "kth", "top", "above", "detection"},
    OutputKind.EMBEDDING: {"embedding", "text"},
    OutputKind.SEQUENCE: {"predicted", "steps"},
}


def model(kind: OutputKind, **changes: object) -> ModelCard:
    """Four classes, or dimensions, and one phrase."""
    return card(output_kind=kind, phrases=("a crane",), **changes)


def check(what: jobs.About, kind: OutputKind, **changes: object) -> int:
    """Asks such a model about something."""
    return check_target(jobs.Target(about=what), model(kind, **changes), "target")


def refusal(what: jobs.About, kind: OutputKind, **changes: object) -> CamserveError:
    """What a target is refused with."""
    with pytest.raises(CamserveError) as caught:
        check(what, kind, **changes)
    return caught.value


def test_every_target_of_a_request_is_asked_here():
    """One that is added to the vocabulary needs its line above; those that are placed are made later."""
    made_later = {jobs.PlacedRegion, jobs.PlacedBox, jobs.ReferenceTensor}

    assert {*map(type, ASKED.values()), jobs.Reference} == set(typing.get_args(jobs.About)) - made_later
    assert set(OutputKind) == HAS.keys()


@pytest.mark.parametrize("kind", OutputKind)
@pytest.mark.parametrize("name", ASKED)
def test_each_kind_of_output_has_its_targets(kind, name):
    """Others are refused with a list of those it has."""
    if name in HAS[kind]:
        assert 1 <= check(ASKED[name], kind) <= 4
        return
    error = refusal(ASKED[name], kind)

    assert (Unsupported, Reason.METHOD_UNSUPPORTED_BY_MODEL, f"target.{name}") == (
        type(error),
        error.reason,
        error.field,
    )
    assert HAS[kind] == set(error.message.rpartition("it has: ")[2].split(", "))


def test_another_image_is_compared_by_its_embedding():
    """Like a vector."""
    assert 1 == check(jobs.Reference(jobs.EncodedImage(data=b"an image")), OutputKind.EMBEDDING)


@pytest.mark.parametrize("kind", OutputKind)
@pytest.mark.parametrize("score", [jobs.Score.SOFTMAX, jobs.Score.REST])
def test_a_probability_is_asked_of_those_that_have_one(kind, score):
    """Values, boxes and vectors have none."""
    name = max(HAS[kind] - {"top"})
    target = jobs.Target(about=ASKED[name], score=score)
    if kind not in {OutputKind.REGRESSION, OutputKind.DETECTION, OutputKind.EMBEDDING}:
        assert 1 == check_target(target, model(kind), "target")
        return

    with pytest.raises(Unsupported, match="it has: logit") as caught:
        check_target(target, model(kind), "target")
    assert "target.score" == caught.value.field


@pytest.mark.parametrize(
    ("what", "kind", "path"),
    [
        (jobs.ClassIndex(4), OutputKind.CLASSIFICATION, "class_index"),
        (jobs.ClassIndex(-1), OutputKind.REGRESSION, "class_index"),
        (jobs.KthClass(0), OutputKind.MULTI_LABEL, "kth.k"),
        (jobs.TopClasses(5), OutputKind.SEGMENTATION, "top.k"),
        (jobs.Difference(4, 0), OutputKind.CLASSIFICATION, "difference.class_index"),
        (jobs.Difference(0, -1), OutputKind.CLASSIFICATION, "difference.other_class_index"),
        (jobs.Region(4), OutputKind.SEGMENTATION, "region.class_index"),
        (jobs.DetectionBox(BOX, 4), OutputKind.DETECTION, "detection.class_index"),
        (jobs.Steps((0, 4)), OutputKind.SEQUENCE, "steps.class_indices[1]"),
    ],
)
def test_classes_that_the_model_lacks_are_refused_at_their_field(what, kind, path):
    """Each place a class can be named at."""
    error = refusal(what, kind)

    assert (InvalidRequest, Reason.CLASS_OUT_OF_RANGE, f"target.{path}") == (type(error), error.reason, error.field)


def test_a_detector_that_does_not_tell_its_classes_takes_any():
    """Only a negative one cannot be; and of its detections any number may be asked for."""
    assert 1 == check(jobs.ClassIndex(90), OutputKind.DETECTION, class_count=0, labels=())
    assert 100 == check(jobs.TopClasses(100), OutputKind.DETECTION)
    assert "target.class_index" == refusal(jobs.ClassIndex(-1), OutputKind.DETECTION, class_count=0, labels=()).field
    assert "target.top.k" == refusal(jobs.TopClasses(0), OutputKind.DETECTION).field


def test_a_vector_has_the_dimensions_of_the_model():
    """Otherwise there is no cosine."""
    error = refusal(jobs.Embedding((1.0, 0.0)), OutputKind.EMBEDDING)

    assert (Reason.FIELD_INVALID, "target.embedding.vector") == (error.reason, error.field)
    assert "has 2 numbers; embeddings of model 'tiny' have 4" in error.message


def test_a_phrase_is_one_of_the_cards():
    """The answer lists them, or says what to do without any."""
    error = refusal(jobs.Phrase("a cran"), OutputKind.EMBEDDING)

    assert (NotFound, Reason.LABEL_NOT_FOUND, "target.text") == (type(error), error.reason, error.field)
    assert error.message.endswith("its phrases are: 'a crane'")
    with pytest.raises(NotFound, match="send the phrase's embedding as a vector"):
        check_target(
            jobs.Target(about=jobs.Phrase("a crane")),
            dataclasses.replace(model(OutputKind.EMBEDDING), phrases=()),
            "target",
        )
