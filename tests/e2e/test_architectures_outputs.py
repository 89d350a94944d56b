"""Every kind of output through a real server: what is predicted and differentiated is what the same network gives here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support import architectures
from support.architectures import eager, scripted, served

from camserve.client import (
    Above,
    Client,
    Difference,
    Embedding,
    FailedPrecondition,
    Heatmap,
    Internal,
    InvalidRequest,
    Kth,
    NotFound,
    Phrase,
    Similar,
    Spec,
    Steps,
    TensorInput,
    TopK,
)
from camserve.server.models.config import InputConfig, OutputConfig

INPUT = InputConfig(size=(32, 32), mean=(0.0,), std=(1.0,))
LABELS = ("scratch", "dent", "stain", "crack")
TOWARDS = np.array([1, 0, -1, 0, 2, 0, 0, 0], np.float32)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """One network of many outputs, read as each kind; a sequence in both forms."""
    phrases = tmp_path_factory.mktemp("phrases") / "phrases.safetensors"
    save_file({"a red bolt": TOWARDS, "nothing": -TOWARDS}, phrases)

    def read(name: str, kind: str, path: str, **config):
        output = OutputConfig(kind=kind, path=path, phrases=str(phrases) if kind == "embedding" else "")
        return eager(name, "answers", INPUT, output=output, **config)

    def make(folder):
        return [
            read("classes", "classification", "classes", labels=LABELS),
            read("several", "multi-label", "classes", labels=LABELS),
            read("values", "regression", "pair.0", labels=("width", "height")),
            read("opposite", "classification", "pair.1", labels=LABELS),
            read("vector", "embedding", "vector"),
            eager("steps", "reader", INPUT, output=OutputConfig(kind="sequence")),
            scripted("scripted-steps", architectures.reader(), folder, INPUT, output=OutputConfig(kind="sequence")),
        ]

    with served(make) as client:
        yield client


def noise(seed: int = 0) -> TensorInput:
    """An input."""
    return TensorInput(np.random.default_rng(seed).normal(size=(3, 32, 32)).astype(np.float32))


def answer(seed: int = 0) -> dict:
    """What the network says of it here."""
    with torch.no_grad():
        return architectures.answers()(torch.from_numpy(np.asarray(noise(seed).array))[None])


def maps(client: Client, model: str, *specs: Spec) -> tuple[Heatmap, ...]:
    """The maps of specs that all succeed."""
    result = client.explain(noise(), model=model, specs=specs)
    result.raise_for_errors()
    return result.heatmaps


def expected_grad_cam(score) -> np.ndarray:
    """Signed Grad-CAM at `body` of any score of the network's answer."""
    module = architectures.answers()
    kept: list[torch.Tensor] = []
    module.body.register_forward_hook(lambda _m, _i, output: kept.append(output))
    (gradient,) = torch.autograd.grad(score(module(torch.from_numpy(np.asarray(noise().array))[None])), kept[0])
    return (gradient.mean((2, 3), keepdim=True) * kept[0].detach()).sum(1)[0].numpy()


def assert_is(heatmap: Heatmap, expected: np.ndarray) -> None:
    """The same numbers, but for the last bits."""
    np.testing.assert_allclose(heatmap.values, expected, rtol=1e-3, atol=1e-4 * float(np.abs(expected).max()))


def grad_cam(**options) -> Spec:
    """Signed Grad-CAM at `body`."""
    return Spec("grad-cam", layers=["body"], rectify=False, encoding="float32", **options)


def test_classes_exclude_one_another_or_do_not(client):
    """Softmax for the one, sigmoid for the other, of the same logits; both in the prediction and as a score."""
    logits = answer()["classes"][0]
    for model, expected in (("classes", logits.softmax(0)), ("several", logits.sigmoid())):
        said = client.explain(noise(), model=model).prediction.classes
        assert expected.sort(descending=True).values.tolist() == pytest.approx([item.probability for item in said])
        assert [LABELS[item.class_index] for item in said] == [item.label for item in said]
        (heatmap,) = maps(client, model, grad_cam(target=1, score="softmax"))
        assert float(expected[1]) == pytest.approx(heatmap.target.value, abs=1e-5)

    assert_is(maps(client, "several", grad_cam(target="dent"))[0], expected_grad_cam(lambda out: out["classes"][0, 1]))
    shares = grad_cam(target=2, score="softmax")
    assert_is(maps(client, "several", shares)[0], expected_grad_cam(lambda out: out["classes"][0, 2].sigmoid()))
    assert_is(maps(client, "classes", shares)[0], expected_grad_cam(lambda out: out["classes"][0].softmax(0)[2]))


def test_labels_above_a_threshold_are_independent(client):
    """Of a multi-label model several may be above one half."""
    shares = answer()["classes"][0].sigmoid()
    wanted = [int(index) for index in shares.argsort(descending=True) if shares[index] > 0.3]

    got = maps(client, "several", Spec("layercam", target=Above(0.3)))

    assert wanted == [item.target.class_index for item in got]
    assert len(wanted) > 1


def test_values_of_a_regression(client):
    """They come in their own order, without probabilities; one, the largest, or the difference of two is explained."""
    values = answer()["pair"][0][0]

    result = client.explain(
        noise(),
        model="values",
        specs=[grad_cam(target="height"), grad_cam(target=Kth(1)), grad_cam(target=Difference(0, 1, 2.0))],
    )

    result.raise_for_errors()
    said = result.prediction.classes
    assert [("width", 0.0), ("height", 0.0)] == [(item.label, item.probability) for item in said]
    assert values.tolist() == pytest.approx([item.logit for item in said], abs=1e-6)
    assert_is(result.heatmaps[0], expected_grad_cam(lambda out: out["pair"][0][0, 1]))
    assert int(values.argmax()) == result.heatmaps[1].target.class_index
    assert_is(result.heatmaps[2], expected_grad_cam(lambda out: out["pair"][0][0, 0] - 2 * out["pair"][0][0, 1]))
    for spec in (Spec("grad-cam", score="softmax"), Spec("grad-cam", target=Above(0.5))):
        with pytest.raises((FailedPrecondition, InvalidRequest), match="regression"):
            maps(client, "values", spec)
    with pytest.raises((FailedPrecondition, InvalidRequest), match="finer-cam"):
        maps(client, "values", Spec("finer-cam"))


def test_an_output_path_of_a_target_reads_elsewhere(client):
    """The card says where the prediction is; a spec may ask about another tensor of the same kind, also of a pair in a dict."""
    plain, named, other, tries = maps(
        client,
        "classes",
        grad_cam(target=1),
        grad_cam(target=1, output_path="classes"),
        grad_cam(target=1, output_path="pair.1"),
        Spec("score-cam", layers=["body"], target=1, output_path="pair.1"),
    )

    assert plain.raw_sha256 == named.raw_sha256
    assert_is(other, expected_grad_cam(lambda out: out["pair"][1][0, 1]))
    assert tries.target.value == other.target.value == pytest.approx(-2 * plain.target.value, rel=1e-4)
    opposite = client.explain(noise(), model="opposite").prediction.classes
    assert [-2 * float(answer()["classes"][0, item.class_index]) for item in opposite] == pytest.approx(
        [item.logit for item in opposite], abs=1e-5
    )
    with pytest.raises((InvalidRequest, Internal, FailedPrecondition), match=r"paths: classes, pair.0, pair.1, vector"):
        maps(client, "classes", grad_cam(output_path="elsewhere"))


def test_embeddings_are_compared_with_vectors_images_and_phrases(client):
    """The score is the cosine, which is what is differentiated; a phrase stands for the vector on the card."""
    vector = answer()["vector"][0]
    other = answer(1)["vector"][0]

    by_vector, by_image, by_phrase, tries = maps(
        client,
        "vector",
        grad_cam(target=Embedding(TOWARDS.tolist())),
        grad_cam(target=Similar(noise(1))),
        grad_cam(target=Phrase("a red bolt")),
        Spec("score-cam", layers=["body"], target=Phrase("nothing"), rectify=False),
    )

    def cosine(values: torch.Tensor):
        return lambda out: torch.cosine_similarity(out["vector"][0], values, dim=0)

    assert vector.tolist() == pytest.approx(client.explain(noise(), model="vector").prediction.embedding, abs=1e-6)
    assert_is(by_vector, expected_grad_cam(cosine(torch.from_numpy(TOWARDS))))
    assert_is(by_image, expected_grad_cam(cosine(other)))
    assert by_vector.raw_sha256 == by_phrase.raw_sha256
    assert "a red bolt" == by_phrase.target.phrase
    assert -by_phrase.target.value == pytest.approx(tries.target.value, abs=1e-6)
    assert ["a red bolt", "nothing"] == list(client.model("vector").phrases)
    with pytest.raises(NotFound, match="'a blue bolt' is not on the card"):
        maps(client, "vector", Spec("grad-cam", target=Phrase("a blue bolt")))


@pytest.mark.parametrize("model", ["steps", "scripted-steps"])
def test_each_step_of_a_sequence_has_a_map_of_its_own(client, model):
    """Step k reads column k of the features, so that nothing else of its map is not zero."""
    with torch.no_grad():
        logits = architectures.reader()(torch.from_numpy(np.asarray(noise().array))[None])[0]

    result = client.explain(
        noise(),
        model=model,
        specs=[
            Spec("hirescam", layers=["body"], rectify=False, encoding="float32"),
            Spec("hirescam", layers=["body"], target=Steps(classes=[4], first=3), rectify=False),
            Spec("score-cam", layers=["body"], target=Steps(first=2, count=1)),
        ],
    )

    result.raise_for_errors()
    assert logits.argmax(1).tolist() == [item.class_index for item in result.prediction.classes]
    every = [item for item in result.heatmaps if item.spec_index == 0]
    assert list(range(8)) == [item.target.step for item in every]
    for step, heatmap in enumerate(every):
        rows, columns = np.nonzero(heatmap.values)
        assert rows.size
        assert {step} == set(columns.tolist())
        assert float(logits[step].max()) == pytest.approx(heatmap.target.value, abs=1e-5)
    assert [(3, 4), (2, int(logits[2].argmax()))] == [
        (item.target.step, item.target.class_index) for item in result.heatmaps[8:]
    ]
    for steps, told in ((Steps(first=8), "step"), (Steps(first=7, count=3), "has steps 0 to 7")):
        with pytest.raises(InvalidRequest, match=told):
            maps(client, model, Spec("grad-cam", target=steps))
    with pytest.raises((InvalidRequest, FailedPrecondition), match="sequence"):
        maps(client, model, Spec("grad-cam", target=TopK(2)))
