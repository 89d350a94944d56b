"""Models of several inputs through a real server, in all three forms: further ones travel by name and stay with their row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import architectures
from support.architectures import eager, exported, scripted, served

from camserve.client import Client, Heatmap, InvalidRequest, Spec, TensorInput
from camserve.server.models.config import ExtraConfig, InputConfig

PLAIN = InputConfig(size=(32, 32), mean=(0.0,), std=(1.0,))
JOINED = PLAIN.model_copy(update={"extra": {"table": ExtraConfig(shape=(4,))}})
CHOSEN = PLAIN.model_copy(update={"extra": {"which": ExtraConfig(dtype="int64")}})
FORMS = ("eager", "scripted", "exported")
SPECS = ("grad-cam", "layercam", "score-cam", "ablation-cam", "occlusion", "integrated-gradients", "smooth-grad-cam++")


@pytest.fixture(scope="module")
def client():
    """A picture with a table in every form; a picture with a whole number."""

    def make(folder):
        module = architectures.joined()
        return [
            eager("eager", "joined", JOINED),
            scripted("scripted", module, folder, JOINED),
            exported("exported", module, folder, JOINED, (torch.randn(2, 3, 32, 32), torch.randn(2, 4))),
            eager("chosen", "chosen", CHOSEN),
        ]

    with served(make) as client:
        yield client


def noise(seed: int = 0) -> np.ndarray:
    """An input."""
    return np.random.default_rng(seed).normal(size=(3, 32, 32)).astype(np.float32)


def table(seed: int = 0) -> np.ndarray:
    """Another."""
    return np.random.default_rng(100 + seed).normal(size=4).astype(np.float32)


def maps(client: Client, model: str, image: np.ndarray, extra: np.ndarray) -> tuple[Heatmap, ...]:
    """A map of each kind of method at `body`."""
    specs = [
        Spec(
            slug,
            rectify=False,
            encoding="float32",
            layers=() if slug in {"occlusion", "integrated-gradients"} else ("body",),
        )
        for slug in SPECS
    ]
    result = client.explain(TensorInput(image), model=model, specs=specs, extra_inputs={"table": TensorInput(extra)})
    result.raise_for_errors()
    return result.heatmaps


@pytest.mark.parametrize("model", FORMS)
def test_every_form_reads_the_further_input(client, model):
    """The logits are the module's own; the card tells what to send."""
    with torch.no_grad():
        expected = architectures.joined()(torch.from_numpy(noise())[None], torch.from_numpy(table())[None])[0]

    said = client.explain(
        TensorInput(noise()), model=model, extra_inputs={"table": TensorInput(table())}
    ).prediction.classes

    assert expected.sort(descending=True).values.tolist() == pytest.approx([item.logit for item in said], abs=1e-5)
    (extra,) = client.model(model).extra_inputs
    assert ("table", (4,), "float32") == (extra.name, extra.shape, extra.dtype)


def test_every_form_gives_the_same_maps(client):
    """Methods of gradients, of tries of layers and of inputs, all with the row's own table."""
    expected = maps(client, "eager", noise(), table())

    for model in FORMS[1:]:
        for one, other in zip(expected, maps(client, model, noise(), table()), strict=True):
            span = float(np.abs(one.values).max())
            np.testing.assert_allclose(other.values, one.values, rtol=1e-3, atol=1e-4 * span, err_msg=one.method)


@pytest.mark.parametrize("model", FORMS)
def test_tries_are_made_with_the_row_s_own_table(client, model):
    """Another table gives other maps, of gradients and of every amplified method."""
    first, second = (maps(client, model, noise(), table(seed)) for seed in (0, 1))

    assert all(one.raw_sha256 != other.raw_sha256 for one, other in zip(first, second, strict=True))


def test_score_cam_is_that_of_its_formula_with_the_table(client):
    """The score of the masked picture beside the same table, less that of the black one; worked out here."""
    module, image, extra = architectures.joined(), torch.from_numpy(noise())[None], torch.from_numpy(table())[None]
    with torch.no_grad():
        logits = module(image, extra)[0]
        target = int(logits.argmax())
        features = module.body(module.stem(image))
        masks = torch.nn.functional.interpolate(features, (32, 32), mode="bilinear", align_corners=False)[0]
        low, high = masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)
        is_alive = (high > low).flatten()
        masks = (masks - low) / (high - low).clamp_min(1e-12)
        rows = image * masks[is_alive][:, None]
        raised = module(rows, extra.expand(len(rows), 4))[:, target]
        base = module(torch.zeros_like(image), extra)[0, target]
        weights = (raised - base).softmax(0)
        expected = torch.einsum("k,khw->hw", weights, features[0][is_alive]).numpy()

    got = maps(client, "eager", noise(), table())[SPECS.index("score-cam")]

    correlation = np.corrcoef(got.values.ravel(), expected.ravel())[0, 1]
    assert correlation > 0.999


def test_rows_of_one_batch_keep_their_own_tables(client):
    """Callers that share passes get what they would have got alone."""
    pairs = [(noise(seed), table(seed)) for seed in range(6)]
    alone = [maps(client, "eager", *pair)[0] for pair in pairs]

    together = [
        client.explain(
            TensorInput(image),
            model="eager",
            specs=[Spec("grad-cam", layers=["body"], rectify=False, encoding="float32")],
            extra_inputs={"table": TensorInput(extra)},
        ).heatmaps[0]
        for image, extra in pairs
    ]

    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other.values, one.values, rtol=1e-4, atol=1e-6)


def test_whole_numbers_travel_too(client):
    """An index as uint8, of no axes; the head it names answers."""
    module = architectures.chosen()
    for which in (0, 1):
        with torch.no_grad():
            expected = module(torch.from_numpy(noise())[None], torch.tensor([which]))[0]
        result = client.explain(
            TensorInput(noise()),
            model="chosen",
            specs=["grad-cam", Spec("score-cam"), Spec("smoothgrad", samples=4)],
            extra_inputs={"which": TensorInput(np.array(which, np.uint8))},
        )
        result.raise_for_errors()
        assert float(expected.max()) == pytest.approx(result.prediction.classes[0].logit, abs=1e-5)


@pytest.mark.parametrize("model", FORMS)
@pytest.mark.parametrize(
    ("extras", "told"),
    [
        ({}, r"takes table \(float32 \(4,\)\); sent: none"),
        ({"chart": np.zeros(4, np.float32)}, r"takes table \(float32 \(4,\)\); sent: chart"),
        ({"table": np.zeros(4, np.float32), "more": np.zeros(1, np.float32)}, "sent: more, table"),
        ({"table": np.zeros((1, 4), np.float32)}, r"extra_inputs\[table\] is float32 \(1, 4\)"),
        ({"table": np.zeros(5, np.float32)}, r"extra_inputs\[table\] is float32 \(5,\)"),
        ({"table": np.full(4, np.nan, np.float32)}, "NaN or infinite"),
        ({"table": np.full(4, 1e300)}, "cannot be held in float32"),
    ],
)
def test_missing_unknown_and_misshapen_inputs_are_refused(client, model, extras, told):
    """With what the model takes and what came."""
    with pytest.raises(InvalidRequest, match=told):
        client.explain(
            TensorInput(noise()),
            model=model,
            extra_inputs={name: TensorInput(values) for name, values in extras.items()},
        )
