"""A model explained in this process gives what a server gives, to the last bit."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.nets import FailsOnBrightRows, NotFinite, TinyNet
from support.patience import under_a_deadline
from support.servers import script_source, settings

from camserve.client import (
    Cancelled,
    Client,
    DeadlineExceeded,
    Difference,
    FailedPrecondition,
    Heatmap,
    Internal,
    InvalidRequest,
    NotFound,
    Prediction,
    Result,
    Spec,
    Summary,
    TensorInput,
    Unimplemented,
)
from camserve.server.local import LocalExplainer

SPECS = [
    Spec("grad-cam"),
    Spec("layercam", layers=["layer2", "layer3"], fusion="max", encoding="float32"),
    Spec("eigen-cam", encoding="png16"),
    Spec("cam", target="scratch", encoding="float16", region_threshold=0.5),
    Spec("guided-backprop", saliency="gray", size="source"),
    Spec("integrated-gradients", steps=6, encoding="float32"),
    Spec("score-cam", channels=8),
    Spec("rise", samples=24, seed=3, encoding="overlay-png"),
    Spec("legrad"),
]


@pytest.fixture(scope="module")
def local():
    """The shipped model, loaded here."""
    with LocalExplainer.load(settings=settings()) as explainer:
        yield explainer


def told(heatmap: Heatmap) -> tuple[object, ...]:
    """Everything a caller is told of a map, digests and payload included."""
    public = [getattr(heatmap, field.name) for field in dataclasses.fields(heatmap) if not field.name.startswith("_")]
    return (*public, heatmap._message.payload, heatmap._message.payload_sha256)


def same(served: Result, made: Result) -> None:
    """Both say the same of the image, of each map and of each failure."""
    assert served.prediction == made.prediction
    assert [told(heatmap) for heatmap in served.heatmaps] == [told(heatmap) for heatmap in made.heatmaps]
    assert [(error.spec_index, str(error.error)) for error in served.errors] == [
        (error.spec_index, str(error.error)) for error in made.errors
    ]


def test_local_maps_are_the_served_ones(client, local, samples):
    """Methods of every kind, amplified ones among them, come with the same payloads, digests and failures."""
    served = client.explain(samples[0], model="surface", specs=SPECS[:-1])

    made = local.explain(samples[0], SPECS[:-1])

    assert 8 == len(made.heatmaps)
    same(served, made)


def test_a_served_batch_can_be_made_again(serve, tmp_path):
    """A row that shared its pass gets the same bits from a pass of as many copies."""
    source = script_source("tiny", TinyNet(), tmp_path)
    images = [np.full((32, 32, 3), shade, np.uint8) for shade in range(0, 240, 20)]
    server = serve(source, batch_window_seconds=0.5)
    with Client(server.target) as client, LocalExplainer(source, settings()) as local:
        served = list(client.explain_many(images, model="tiny", specs=["grad-cam"], concurrency=len(images)))

        for image, result in zip(images, served, strict=True):
            same(result, local.explain(image, ["grad-cam"], batch_rows=result.summary.batch_rows))
    assert max(result.summary.batch_rows for result in served) > 1


def test_the_card_is_the_served_one(client, local):
    """But for what was measured: the time that loading took, and how much faster the form is that serves."""
    served = client.model("surface")
    plan = dataclasses.replace(local.card.plan, speedup=served.plan.speedup)

    assert served == dataclasses.replace(local.card, warm_up_seconds=served.warm_up_seconds, plan=plan)


def test_events_come_as_they_are_made(local, samples):
    """The prediction first, the maps, the summary last."""
    events = list(local.stream(samples[0], ["grad-cam", "eigen-cam"]))

    assert [Prediction, Heatmap, Heatmap, Summary] == [type(event) for event in events]


def test_many_images_come_in_order(local, samples):
    """One result for each image, made when it is asked for."""
    results = local.explain_many(iter(samples), ["grad-cam"])

    assert [str(path) for path in samples[:2]] == [next(results).source, next(results).source]


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        ({"specs": [Spec("grad-cam", layers=["layer9"])]}, NotFound, "layer9"),
        ({"specs": [Spec("legrad")]}, FailedPrecondition, "legrad"),
        ({"specs": [Spec("grad-cam", target=99)]}, InvalidRequest, "from 0 to 4"),
        ({"specs": ["grad-cam"] * 33}, InvalidRequest, "33 specs"),
        ({"version": "7"}, NotFound, "version '7' is not loaded; it is '1'"),
        ({"batch_rows": 17}, InvalidRequest, "batch_rows must be from 1 to 16"),
    ],
    ids=["layer", "method", "class", "specs", "version", "rows"],
)
def test_refusals_are_those_of_a_client(local, samples, asked, kind, words):
    """A request that a server would refuse is refused with the same class and the same words."""
    with pytest.raises(kind, match=words):
        local.explain(samples[0], **asked)


def test_one_failed_spec_leaves_the_others(local, client, samples):
    """What only a pass can tell fails alone, as it does on a server."""
    specs = ["grad-cam", Spec("finer-cam", target=Difference(1, 2))]
    served = client.explain(samples[0], model="surface", specs=specs)

    made = local.explain(samples[0], specs)

    assert (1, 1) == (len(made.heatmaps), len(made.errors))
    same(served, made)


def test_a_failing_model_is_told(tmp_path):
    """What a model raises, or scores that are not finite, become the client's error."""
    bright = TensorInput(np.full((3, 32, 32), 9, np.float32))
    for net, words in ((FailsOnBrightRows(), "model 'bad' failed on this input"), (NotFinite(), "not finite")):
        with LocalExplainer(script_source("bad", net, tmp_path), settings()) as explainer:
            with pytest.raises(Internal, match=words):
                explainer.explain(bright)
            assert explainer.explain(TensorInput(np.zeros((3, 32, 32), np.float32))).prediction.classes


def test_the_deadline_leaves_the_best_map_so_far(local, samples):
    """A method that allows it sends what it has; another fails the request."""
    endless = Spec("rise", samples=10_000, allow_partial=True)

    result = under_a_deadline(
        lambda seconds: local.explain(samples[0], [endless], deadline=seconds), lambda result: bool(result.heatmaps)
    )

    (heatmap,) = result.heatmaps
    assert {"partial"} <= heatmap.flags
    assert 0 < heatmap.completed < 1
    with pytest.raises(DeadlineExceeded, match="give it longer"):
        local.explain(samples[0], [Spec("rise", samples=10_000)], deadline=0.3)


def test_a_closed_explainer_says_so(samples):
    """As a closed client does."""
    explainer = LocalExplainer.load(settings=settings())
    explainer.close()
    explainer.close()

    with pytest.raises(Cancelled, match="closed"):
        explainer.explain(samples[0])


def test_a_model_by_file_labels_and_size(tmp_path):
    """A bare archive takes labels and size from the caller; the model is left as it was found."""
    path = tmp_path / "part.pt"
    torch.jit.save(torch.jit.script(TinyNet().eval()), str(path))

    with LocalExplainer.load(path, labels=["a", "b", "c", "d"], size=48, device="cpu") as explainer:
        result = explainer.explain(np.zeros((20, 30, 3), np.uint8), "grad-cam")

    assert ("part", (3, 48, 48)) == (explainer.card.name, explainer.card.input.shape)
    assert result.prediction.label in "abcd"


def test_a_profile_without_the_method_is_refused(local, samples):
    """The library's conventions cannot be followed where it has no such method."""
    with pytest.raises((InvalidRequest, Unimplemented), match="torchcam has no hirescam"):
        local.explain(samples[0], [Spec("hirescam", profile="torchcam")])


class Staged(TinyNet):
    """Two classes, and a layer of the name that the page's example asks for."""

    def __init__(self) -> None:
        super().__init__(classes=2)
        self.layer2 = self.stem

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b 3 h w) to (b 2)."""
        return self.head(self.body(self.layer2(x)).mean((2, 3)))


def test_the_example_of_the_page_runs(tmp_path, samples, monkeypatch, capsys):
    """docs/local.md's first example, as it is written."""
    page = (Path(__file__).parents[2] / "docs/local.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0]
    torch.jit.save(torch.jit.script(Staged().eval()), str(tmp_path / "part.pt"))
    shutil.copy(samples[0], tmp_path / "part.jpg")
    monkeypatch.chdir(tmp_path)

    exec(compile(example, "docs/local.md", "exec"), {})  # noqa: S102 - our own page

    layer, told = capsys.readouterr().out.splitlines()
    assert "body" == layer
    assert re.fullmatch(r"(good|scratch) [0-9a-f]{64}", told)
    assert (tmp_path / "why.png").stat().st_size > 0
