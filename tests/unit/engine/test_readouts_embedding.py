import pytest
import torch
from torch.nn.functional import cosine_similarity

from camserve.server.cam.methods import Contrast
from camserve.server.engine.readouts import Readout, read
from camserve.server.errors import CamserveError, ExecutionFailed, InvalidRequest, Unsupported
from camserve.server.jobs import ClassIndex, Embedding, OutputKind, Polarity, Predicted, Score, Target

VECTOR = (1.0, -2.0, 0.5)


def embedding(vectors: torch.Tensor) -> Readout:
    """What a pass makes of a model that returns these vectors."""
    return read(OutputKind.EMBEDDING, {"embedding": vectors}, "", rows=vectors.shape[0], classes=vectors.shape[1])


def test_a_score_is_the_cosine() -> None:
    """Value and gradient as PyTorch's; rows without an aim have neither, and polarity turns the sign."""
    vectors = torch.randn(3, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64, requires_grad=True)
    found = embedding(vectors)
    (towards,) = found.aims(0, Target(about=Embedding(VECTOR)))
    (against,) = found.aims(2, Target(about=Embedding(VECTOR), polarity=Polarity.AGAINST))
    scores = found.scores([towards, None, against])
    (gradient,) = torch.autograd.grad(scores.sum(), vectors)
    signs = torch.tensor([1.0, 0.0, -1.0])
    theirs = cosine_similarity(vectors, torch.tensor(VECTOR).double()[None]) * signs
    (expected,) = torch.autograd.grad(theirs.sum(), vectors)

    torch.testing.assert_close(scores, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    assert [scores[0].item(), -scores[2].item()] == pytest.approx(
        [towards.target.value, against.target.value], rel=1e-12
    )
    assert towards.target.class_index is None
    assert towards.key != against.key


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_length_does_not_matter(scale: float) -> None:
    """Neither overflow nor underflow of a square reaches the cosine."""
    found = embedding(torch.tensor([[3.0, 4.0]]))
    (aim,) = found.aims(0, Target(about=Embedding((scale, 0.0))))

    assert 0.6 == pytest.approx(aim.target.value)
    assert [0.6] == pytest.approx(found.scores([aim]).tolist())


@pytest.mark.parametrize(
    ("target", "refusal", "message"),
    [
        (
            Target(about=Predicted()),
            Unsupported,
            "'predicted' does not fit .* embedding; it can be asked about: embedding, text",
        ),
        (Target(about=ClassIndex(0)), Unsupported, "'class_index' does not fit"),
        (Target(about=Embedding((1.0,))), InvalidRequest, "has 1 components, and the model's embedding has 3"),
        (Target(about=Embedding((0.0, 0.0, 0.0))), InvalidRequest, "zero or not finite"),
        (Target(about=Embedding((0.0, float("nan"), 0.0))), InvalidRequest, "zero or not finite"),
        (Target(about=Embedding(VECTOR), score=Score.SOFTMAX), Unsupported, "score 'softmax' does not fit"),
    ],
)
def test_what_cannot_be_compared_is_refused(target: Target, refusal: type[CamserveError], message: str) -> None:
    """A model of this kind predicts nothing: a vector of its own dimensions must be given."""
    with pytest.raises(refusal, match=message):
        embedding(torch.ones(1, 3)).aims(0, target)


def test_a_similarity_has_no_nearest_classes() -> None:
    """Finer-CAM is refused."""
    with pytest.raises(Unsupported, match="a similarity has none; use grad-cam"):
        embedding(torch.ones(1, 3)).aims(0, Target(about=Embedding(VECTOR)), Contrast(classes=3, weight=1.0))


@pytest.mark.parametrize(
    ("number", "message"), [(0.0, "embedding of this input is zero"), (float("inf"), "infinite numbers")]
)
def test_vectors_without_a_direction_fail_the_row(number: float, message: str) -> None:
    """They are still read."""
    found = embedding(torch.full((1, 3), number))

    with pytest.raises(ExecutionFailed, match=message):
        found.aims(0, Target(about=Embedding(VECTOR)))
    assert [number] * 3 == found.readings()[0].scores.tolist()
    assert 0 == found.readings()[0].probabilities.size


def test_another_input_without_a_direction_scores_zero() -> None:
    """An amplified method may blank its input entirely."""
    (aim,) = embedding(torch.ones(1, 3)).aims(0, Target(about=Embedding(VECTOR)))
    vectors = torch.zeros(2, 3, requires_grad=True)
    scores = embedding(vectors).scores([aim, aim])
    (gradient,) = torch.autograd.grad(scores.sum(), vectors)

    assert [0.0, 0.0] == scores.tolist()
    assert gradient.isfinite().all()


def test_as_many_aims_as_rows() -> None:
    """A short list is refused, not cut off."""
    with pytest.raises(ValueError, match="0 aims for a batch of 1 rows"):
        embedding(torch.ones(1, 3)).scores([])
