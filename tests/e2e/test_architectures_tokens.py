"""Transformers through a real server: tokens with 0 to 5 before the patches, (b h w c) blocks, grids that are not square."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import architectures
from support.architectures import eager, scripted, served

from camserve.client import FailedPrecondition, Heatmap, Spec, TensorInput
from camserve.server.models.config import InputConfig

SQUARE, WIDE = InputConfig(size=(32, 32)), InputConfig(size=(32, 64))
# By model: its input, and the cells of a map.
MODELS = {
    "torchvision-vit": ((3, 32, 32), (4, 4)),
    "vit-without-prefix": ((3, 32, 64), (4, 8)),
    "vit-with-class": ((3, 32, 64), (4, 8)),
    "vit-with-two": ((3, 32, 64), (4, 8)),
    "vit-with-registers": ((3, 32, 64), (4, 8)),
    "swin": ((3, 32, 32), (8, 8)),
    "scripted-torchvision-vit": ((3, 32, 32), (4, 4)),
    "scripted-vit-with-class": ((3, 32, 64), (4, 8)),
}
ATTENTION = ("legrad", "attention-rollout")


@pytest.fixture(scope="module")
def client():
    """All of them."""

    def make(folder):
        return [
            *(
                eager(name, name.replace("-", "_"), SQUARE if shape[2] == 32 else WIDE)
                for name, (shape, _) in MODELS.items()
                if not name.startswith("scripted")
            ),
            scripted("scripted-torchvision-vit", architectures.torchvision_vit(), folder, SQUARE),
            scripted("scripted-vit-with-class", architectures.vit_with_class(), folder, WIDE),
        ]

    with served(make) as client:
        yield client


def noise(model: str) -> TensorInput:
    """An input of its, always the same."""
    return TensorInput(np.random.default_rng(5).normal(size=MODELS[model][0]).astype(np.float32))


def maps(client, model: str, *specs: Spec) -> tuple[Heatmap, ...]:
    """The maps of specs that all succeed."""
    result = client.explain(noise(model), model=model, specs=specs)
    result.raise_for_errors()
    return result.heatmaps


@pytest.mark.parametrize("model", MODELS)
def test_layers_of_tokens_give_maps_over_their_patches(client, model):
    """At the default layer, without the tokens before the patches; none is empty."""
    methods = ["grad-cam", "layercam", "eigen-cam", "score-cam", "seg-xres-cam"]
    if model != "scripted-vit-with-class":  # Its blocks stand in a branch, where an archive cannot be cut.
        methods.append("ablation-cam")

    got = maps(client, model, *(Spec(slug, rectify=False, encoding="float32") for slug in methods))

    assert {MODELS[model][1]} == {heatmap.values.shape for heatmap in got}
    assert all(np.isfinite(heatmap.values).all() and heatmap.values.any() for heatmap in got)


@pytest.mark.parametrize("model", [model for model in MODELS if model != "swin"])
def test_attention_lies_on_the_patches_whatever_stands_before_them(client, model):
    """Early layers have no class token yet: the grid is that of the layer with as many tokens as the attention has keys."""
    got = maps(client, model, *(Spec(slug, encoding="float32") for slug in ATTENTION))

    assert {MODELS[model][1]} == {heatmap.values.shape for heatmap in got}
    assert all(heatmap.values.max() > 0 for heatmap in got)


def test_attention_within_windows_is_refused(client):
    """What a window attends to does not lie on the image."""
    for slug in ATTENTION:
        with pytest.raises(FailedPrecondition, match=r"does not work on model 'swin'.*methods that do: .*grad-cam"):
            client.explain(noise("swin"), model="swin", specs=[slug])


@pytest.mark.parametrize("model", ["torchvision-vit", "vit-with-class"])
def test_both_forms_of_a_transformer_give_the_same_maps(client, model):
    """Eager and scripted networks of the same weights, with methods of gradient, of tries and of attention."""
    specs = [Spec(slug, rectify=False, encoding="float32") for slug in ("grad-cam", "score-cam", *ATTENTION)]

    expected, got = maps(client, model, *specs), maps(client, f"scripted-{model}", *specs)

    for one, other in zip(expected, got, strict=True):
        np.testing.assert_allclose(other.values, one.values, rtol=1e-3, atol=1e-4 * float(np.abs(one.values).max()))


def test_channels_of_tokens_are_ablated_in_the_patches_alone(client):
    """Ablation-CAM worked out with a hook: (y - y_k) / y of each channel, set to 0 in the patches; the class token stays."""
    module = architectures.vit_with_class()
    image = torch.from_numpy(np.asarray(noise("vit-with-class").array))[None]
    with torch.no_grad():
        logits = module(image)[0]
        target = int(logits.argmax())
        patches = module.blocks[0].register_forward_hook(lambda _m, _i, output: kept.append(output))
        kept: list[torch.Tensor] = []
        module(image)
        patches.remove()
        drops = []
        for channel in range(16):
            replaced = kept[0].clone()
            replaced[:, 1:, channel] = 0
            hook = module.blocks[0].register_forward_hook(lambda _m, _i, _o, replaced=replaced: replaced)
            drops.append((logits[target] - module(image)[0, target]) / logits[target])
            hook.remove()
    expected = torch.einsum("k,nk->n", torch.stack(drops), kept[0][0, 1:]).view(4, 8).numpy()

    spec = Spec("ablation-cam", layers=["blocks.0"], rectify=False, encoding="float32")
    (got,) = maps(client, "vit-with-class", spec)

    np.testing.assert_allclose(got.values, expected, rtol=1e-3, atol=1e-4 * float(np.abs(expected).max()))


def test_grad_cam_of_tokens_is_that_of_its_formula(client):
    """The mean of the gradient over the patches, times the patches; by autograd."""
    module = architectures.vit_with_registers()
    image = torch.from_numpy(np.asarray(noise("vit-with-registers").array))[None]
    kept: list[torch.Tensor] = []
    module.blocks[0].register_forward_hook(lambda _m, _i, output: kept.append(output))
    logits = module(image)[0]
    (gradient,) = torch.autograd.grad(logits.max(), kept[0])
    expected = torch.einsum("k,nk->n", gradient[0, 5:].mean(dim=0), kept[0].detach()[0, 5:]).view(4, 8).numpy()

    spec = Spec("grad-cam", layers=["blocks.0"], rectify=False, encoding="float32")
    (got,) = maps(client, "vit-with-registers", spec)

    np.testing.assert_allclose(got.values, expected, rtol=1e-3, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize(
    ("model", "layer", "default"),
    [
        ("torchvision-vit", "encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_0"),
        ("vit-with-class", "blocks.1", "blocks.0"),
        ("vit-with-registers", "norm", "blocks.0"),
        ("scripted-torchvision-vit", "encoder.ln", "encoder.layers.encoder_layer_0"),
    ],
)
def test_patches_that_nobody_reads_any_more_are_refused_for_gradients(client, model, layer, default):
    """Behind the last block only the class token is read: the default avoids it, and who asks for it is told what works."""
    assert default == client.model(model).default_layer
    for slug in ("grad-cam", "layercam", "eigen-grad-cam"):
        with pytest.raises(FailedPrecondition, match=rf"no score depends on any patch of it.*default: {default}"):
            client.explain(noise(model), model=model, specs=[Spec(slug, layers=[layer])])

    got = maps(client, model, Spec("eigen-cam", layers=[layer]), Spec("score-cam", layers=[layer]))

    assert [(layer,), (layer,)] == [heatmap.layers for heatmap in got]


def test_patches_that_are_averaged_are_not_refused(client):
    """Where the mean of the patches is classified, the last block has a gradient."""
    (got,) = maps(client, "vit-without-prefix", Spec("grad-cam", layers=["blocks.1"], rectify=False))

    assert got.raw_max > got.raw_min
