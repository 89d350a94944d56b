"""What cannot be explained says so, through a server: status, method, kind of program, layer, and what would work.

What can be explained only to nothing is a map that is flagged, never a silent zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.refusing import (
    KINDS,
    decided,
    detached,
    functional,
    rounded,
    served_as,
    tokens,
    two_outputs,
)
from support.servers import script_source, settings
from torch import Tensor, nn

from camserve.client import (
    Above,
    Box,
    CamserveError,
    Client,
    DetectionBox,
    FailedPrecondition,
    InvalidRequest,
    Kth,
    NotFound,
    Result,
    Spec,
    TensorInput,
    TopK,
)
from camserve.server.background import BackgroundServer
from camserve.server.models.config import InputConfig, OutputConfig

ROW = TensorInput(np.random.default_rng(0).standard_normal((3, 32, 32)).astype(np.float32))
# What a program calls itself; a trace is an archive of TorchScript too.
TOLD = {"eager": "eager", "scripted": "torchscript", "traced": "torchscript", "exported": "export"}


class Finds(nn.Module):
    """A detector of one box, at the upper left."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        """As torchvision's detectors do."""
        features = self.body(x)
        found: list[dict[str, Tensor]] = []
        for row in range(x.shape[0]):
            score = features[row].mean().reshape(1).sigmoid()
            box = x.new_zeros((1, 4)) + score.detach() * 0
            box[:, 2:] = 8.0
            found.append({"boxes": box, "labels": (score * 0).long() + 1, "scores": score})
        return found


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a server of all of them."""
    folder: Path = tmp_path_factory.mktemp("models")
    made = [
        *itertools.product(KINDS, [functional, decided, detached, rounded]),
        ("eager", tokens),
        ("traced", tokens),
    ]
    sources = [served_as(kind, factory, folder) for kind, factory in made]
    sources += [served_as(kind, two_outputs, folder, path="logits") for kind in KINDS]
    detection = OutputConfig(kind="detection")
    sources.append(script_source("finds", Finds(), folder, output=detection, input=InputConfig(size=(32, 32))))
    with BackgroundServer(settings(), sources) as server, Client(server.target, timeout=60) as client:
        yield client


def refused(client: Client, model: str, spec: Spec | str) -> CamserveError:
    """The error of the spec, or of the whole request where its fault is plain before the pass."""
    try:
        result = client.explain(ROW, model=model, specs=[spec])
    except CamserveError as error:
        return error
    assert [] == [heatmap.flags for heatmap in result.heatmaps]
    (only,) = result.errors
    return only.error


def assert_told(error: CamserveError, kind: type[CamserveError], reason: str, *words: str) -> None:
    """Status, reason, and every word."""
    assert (kind, reason) == (type(error), error.reason)
    assert [] == [word for word in words if word not in str(error)]


@pytest.mark.parametrize("method", ["guided-backprop", "guided-grad-cam", "deconvnet"])
def test_functional_relus_of_an_eager_model(client, method):
    """They cannot be gated there: the message names the operator, and that archives can."""
    error = refused(client, "functional-eager", method)

    words = (method, "(eager)", "nn.ReLU", "aten.relu", "scripted or exported", "vanilla-backprop", "grad-cam")
    assert_told(error, FailedPrecondition, "METHOD_UNSUPPORTED_BY_MODEL", *words)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_functional_relus_of_an_archive(client, kind):
    """They are gated as modules are: the map is neither empty nor that of the plain gradient."""
    result = client.explain(ROW, model=f"functional-{kind}", specs=["guided-backprop", "vanilla-backprop"])

    guided, plain = (heatmap.values for heatmap in result.heatmaps)
    assert 0 < np.abs(guided).max()
    assert not np.allclose(guided, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["grad-cam", "smoothgrad", "legrad"])
def test_a_decision_instead_of_scores(client, kind, method):
    """An argmax has no derivative anywhere: methods with a gradient are refused, and those without are named."""
    error = refused(client, f"decided-{kind}", method)

    words = (method, f"({TOLD[kind]})", "eigen-cam", "score-cam")
    assert_told(error, FailedPrecondition, "METHOD_UNSUPPORTED_BY_MODEL", *words)
    assert client.explain(ROW, model=f"decided-{kind}", specs=["ablation-cam"]).heatmaps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spec", "where"),
    [
        (Spec("grad-cam", layers=["stem"]), "layer 'stem'"),
        (Spec("shapley-cam", layers=["body"]), "layer 'body'"),
        (Spec("grad-cam", layers=["body"], augmentation_smooth=True), "layer 'body'"),
        (Spec("vanilla-backprop"), "the model's input"),
        (Spec("smoothgrad", samples=2), "the model's input"),
    ],
    ids=["layer", "curvature", "smoothed", "input", "amplified"],
)
def test_detached_features(client, kind, spec, where):
    """The gradient ends behind the layer: the message says where, and what needs none."""
    error = refused(client, f"detached-{kind}", spec)

    words = (spec.method, TOLD[kind], where, "detached", "eigen-cam", "score-cam")
    assert_told(error, FailedPrecondition, "TARGET_NOT_DIFFERENTIABLE", *words)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_zero_everywhere(client, kind):
    """It gives a map of zeros with a flag, whatever the normalisation; the activation alone still gives one."""
    specs = [
        Spec("grad-cam", layers=["stem"]),
        Spec("layercam", layers=["stem"], normalisation="min-max"),
        Spec("vanilla-backprop"),
        Spec("smoothgrad", samples=2),
        Spec("eigen-cam", layers=["stem"]),
    ]
    result = client.explain(ROW, model=f"rounded-{kind}", specs=specs)

    assert [True, True, True, True, False] == ["empty" in heatmap.flags for heatmap in result.heatmaps]
    assert [0.0] * 4 == [float(np.abs(heatmap.values).max()) for heatmap in result.heatmaps[:4]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_behind_the_scores(client, kind):
    """No gradient reaches it, and taking channels away there moves nothing: a refusal, and maps that are flagged."""
    model = f"two-outputs-{kind}"
    error = refused(client, model, Spec("grad-cam", layers=["decoder"]))
    moved = client.explain(ROW, model=model, specs=[Spec("ablation-cam", layers=["decoder"], target=1)])

    words = ("grad-cam", TOLD[kind], "layer 'decoder'", "after the scores", "choose a layer that feeds the scores")
    assert_told(error, FailedPrecondition, "TARGET_NOT_DIFFERENTIABLE", *words)
    assert [True] == ["empty" in heatmap.flags for heatmap in moved.heatmaps]


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_beside_the_scores(client, kind):
    """One without gradients is refused like a detached layer; one that does not exist lists those that do."""
    model = f"two-outputs-{kind}"
    decision = refused(client, model, Spec("grad-cam", layers=["body"], output_path="decision"))
    nothing = refused(client, model, Spec("grad-cam", output_path="nothing"))

    words = ("grad-cam", TOLD[kind], "layer 'body'", "score-cam")
    assert_told(decision, FailedPrecondition, "TARGET_NOT_DIFFERENTIABLE", *words)
    assert_told(nothing, InvalidRequest, "FIELD_INVALID", "output_path 'nothing'", "logits, decision, picture")


def test_fused_attention_without_a_derivative(client):
    """A transformer traced on its fast path: no gradient passes its kernel, so it is refused with what works before it."""
    error = refused(client, "tokens-traced", Spec("grad-cam", layers=["patches"]))

    words = ("grad-cam", "(torchscript)", "fused attention", "set_fastpath_enabled(False)", "torch.export", "eigen-cam")
    assert_told(error, FailedPrecondition, "METHOD_UNSUPPORTED_BY_MODEL", *words)
    assert client.explain(ROW, model="tokens-traced", specs=["eigen-cam"]).heatmaps
    assert client.explain(ROW, model="tokens-eager", specs=[Spec("grad-cam", layers=["patches"])]).heatmaps


TARGETS = {
    "k": (Spec("grad-cam", target=Kth(9)), InvalidRequest, "CLASS_OUT_OF_RANGE", ("target.kth.k", "1 to 4", "is 9")),
    "top k": (Spec("grad-cam", target=TopK(9)), InvalidRequest, "CLASS_OUT_OF_RANGE", ("target.top.k", "1 to 4")),
    "k of zero": (Spec("score-cam", target=TopK(0)), InvalidRequest, "CLASS_OUT_OF_RANGE", ("target.top.k", "1 to 4")),
    "class": (Spec("ablation-cam", target=4), InvalidRequest, "CLASS_OUT_OF_RANGE", ("0 to 3", "is 4")),
    "no class that sure": (
        Spec("grad-cam", target=Above(0.999)),
        InvalidRequest,
        "FIELD_INVALID",
        ("0.999", "largest"),
    ),
    "no channel": (Spec("score-cam", channels=0), InvalidRequest, "FIELD_INVALID", ("channels", "at least 1", "is 0")),
    "fewer than none": (Spec("ablation-cam", channels=-3), InvalidRequest, "FIELD_INVALID", ("channels", "is -3")),
    "no layer": (Spec("grad-cam", layers=["bodi"]), NotFound, "LAYER_NOT_FOUND", ("'bodi'", "near names: body")),
    "flat layer": (
        Spec("grad-cam", layers=["head"]),
        FailedPrecondition,
        "LAYER_UNUSABLE",
        ("grad-cam", "'head'", "(torchscript)", "default: body"),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_what_the_model_does_not_have(client, name):
    """Classes, ranks, channels and layers beyond the model's are refused with those it has."""
    spec, kind, reason, words = TARGETS[name]

    assert_told(refused(client, "functional-scripted", spec), kind, reason, *words)


def test_a_box_that_matches_nothing(client):
    """A detector's box far from all it found is refused with the best overlap there was."""
    far = DetectionBox(Box(20, 20, 8, 8))
    error = refused(client, "finds", Spec("grad-cam", layers=["body"], target=far))

    assert type(error) in (InvalidRequest, NotFound)
    assert [] == [word for word in ("0.5", "IoU") if word.lower() not in str(error).lower()]


def test_one_refusal_leaves_the_rest(client):
    """What cannot be made is an error of its spec; the prediction and every other map are there."""
    specs = ["grad-cam", Spec("grad-cam", layers=["decoder"]), "eigen-cam"]
    result: Result = client.explain(ROW, model="two-outputs-scripted", specs=specs)

    assert result.prediction.classes
    assert [0, 2] == [heatmap.spec_index for heatmap in result.heatmaps]
    assert [1] == [error.spec_index for error in result.errors]
