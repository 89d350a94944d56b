import io
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from camserve.server.engine.eager import EagerProgram
from camserve.server.engine.export import ExportProgram, load_export
from camserve.server.engine.hooked import HookedProgram
from camserve.server.engine.program import ATTENTION, BackwardRule, Capture, TapName
from camserve.server.errors import NotFound, Unsupported

CPU = torch.device("cpu")
RULE = BackwardRule.ATTENTION


def exported(network: nn.Module, inputs: Tensor) -> ExportProgram:
    """The network, through a file."""
    stream = io.BytesIO()
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    torch.export.save(torch.export.export(network.eval(), (inputs,), dynamic_shapes=(batch,)), stream)
    stream.seek(0)
    return load_export(stream, device=CPU)


def decomposed(network: nn.Module, inputs: Tensor) -> ExportProgram:
    """The network in the operators of core ATen."""
    return ExportProgram(torch.export.export(network.eval(), (inputs,)).run_decompositions(), device=CPU)


def eager(network: nn.Module, _inputs: Tensor) -> EagerProgram:
    """The network itself."""
    return EagerProgram(network, device=CPU)


LOADS = pytest.mark.parametrize("load", [eager, exported], ids=["eager", "export"])
ALL_LOADS = pytest.mark.parametrize("load", [eager, exported, decomposed], ids=["eager", "export", "decomposed export"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def captured(program: HookedProgram, inputs: Tensor, *others: TapName) -> tuple[Capture, list[Tensor]]:
    """A capture, and the attention probabilities in order."""
    found = program.capture([ATTENTION, *others], inputs, rule=RULE)
    taps = [tap for tap in found.activations if tap.path == ATTENTION.path]
    assert taps == [TapName(ATTENTION.path, call) for call in range(len(taps))]
    return found, [found.activations[tap] for tap in taps]


class Multi(nn.Module):
    """Two of PyTorch's attention layers over the positions of a map."""

    def __init__(self, *, needs_weights: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=first) for first in (True, False))
        self.head = nn.Linear(8, 5)
        self.needs_weights = needs_weights

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 5)."""
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.layers[0](x, x, x, need_weights=self.needs_weights)[0]
        y = x.transpose(0, 1)
        y = y + self.layers[1](y, y, y, need_weights=self.needs_weights)[0]
        return self.head(y.mean(0))


def by_weights(network: Multi, inputs: Tensor) -> list[Tensor]:
    """The probabilities that the layers themselves report."""
    x = network.stem(inputs).flatten(2).transpose(1, 2)
    y, first = network.layers[0](x, x, x, need_weights=True, average_attn_weights=False)
    z = (x + y).transpose(0, 1)
    return [first, network.layers[1](z, z, z, need_weights=True, average_attn_weights=False)[1]]


@ALL_LOADS
@pytest.mark.parametrize("needs_weights", [True, False], ids=["weights", "fused"])
def test_probabilities_are_those_that_multi_head_attention_reports(
    load: Callable[..., HookedProgram],
    needs_weights: bool,  # noqa: FBT001 - a test parameter
) -> None:
    """Per head, in order, whether or not the model asks for them itself; the scores agree to the last bits."""
    network, inputs = Multi(needs_weights=needs_weights).eval(), torch.randn(2, 3, 16, 16)
    program = load(network, inputs)

    found, values = captured(program, inputs)

    assert [(2, 2, 16, 16)] * 2 == [tuple(value.shape) for value in values]
    for expected, value in zip(by_weights(network, inputs), values, strict=True):
        assert torch.allclose(expected, value, rtol=1e-5, atol=1e-6)
    assert torch.allclose(program.run(inputs), found.outputs, rtol=1e-5, atol=1e-6)


def test_a_model_that_uses_reported_weights_gets_them() -> None:
    """Averaged over heads, as PyTorch does, and with a graph."""

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y, weights = self.layer(x, x, x)
            return (weights @ y).mean(1)

    program, inputs = EagerProgram(Uses(), device=CPU), torch.randn(2, 6, 8)

    found, (value,) = captured(program, inputs)

    assert torch.allclose(program.run(inputs), found.outputs, rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(found.outputs.sum(), value)[0].any()


class Plain(nn.Module):
    """Attention written out, so that its probabilities can be made leaves by hand."""

    def __init__(self, *, is_fused: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 5)
        self.is_fused = is_fused

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, query, key and value."""
        x = self.stem(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return x, query, key, value

    def rest(self, x: Tensor, y: Tensor) -> Tensor:
        """From values to scores."""
        return self.head((x + y.transpose(1, 2).flatten(2)).mean(1))

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) to (b, 5)."""
        x, query, key, value = self.parts(images)
        if self.is_fused:
            return self.rest(x, functional.scaled_dot_product_attention(query, key, value))
        probabilities = (query @ key.transpose(-2, -1) / 2).softmax(dim=-1)
        return self.rest(x, probabilities @ value)


@ALL_LOADS
@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "unfused"])
def test_gradients_are_those_of_attention_by_hand(
    load: Callable[..., HookedProgram],
    is_fused: bool,  # noqa: FBT001 - a test parameter
) -> None:
    """The probabilities are a leaf, as the earliest tap; behind another tap they are in its graph."""
    network, inputs = Plain(is_fused=is_fused).eval(), torch.randn(2, 3, 16, 16)
    x, query, key, value = network.parts(inputs)
    leaf = (query @ key.transpose(-2, -1) / 2).softmax(-1).detach().requires_grad_()
    (expected,) = torch.autograd.grad(network.rest(x, leaf @ value)[:, 2].sum(), leaf)
    program = load(network, inputs)

    found, (alone,) = captured(program, inputs)
    (gradient,) = torch.autograd.grad(found.outputs[:, 2].sum(), alone)
    behind, (later,) = captured(program, inputs, TapName("stem"))
    stem_gradient, later_gradient = torch.autograd.grad(
        behind.outputs[:, 2].sum(), [behind.activations[TapName("stem")], later]
    )

    assert (True, False) == (alone.is_leaf, later.is_leaf)
    for other in (gradient, later_gradient):
        assert torch.allclose(expected, other, rtol=1e-4, atol=1e-7)
    assert stem_gradient.any()


@pytest.mark.parametrize("masking", ["causal", "bool", "float", "scale", "blind", "groups"])
def test_masks_and_scales_are_those_of_the_fused_kernel(masking: str) -> None:
    """Every argument of the fused function, against the fused function itself; a query without keys gives zeros."""
    allowed = torch.rand(6, 6) > 0.5
    allowed.fill_diagonal_(fill_value=True)
    blind = allowed.clone()
    blind[2] = False
    options = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": allowed},
        "float": {"attn_mask": torch.randn(2, 1, 6, 6)},
        "scale": {"scale": 0.3},
        "blind": {"attn_mask": blind},
        "groups": {"enable_gqa": True},
    }[masking]

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            other = x[:, :2] if masking == "groups" else x
            return functional.scaled_dot_product_attention(x, other.sin(), other.cos(), **options)

    program, inputs = EagerProgram(Masked(), device=CPU), torch.randn(2, 4, 6, 8)

    found, (value,) = captured(program, inputs)

    assert torch.allclose(program.run(inputs), found.outputs, rtol=1e-5, atol=1e-6)
    total = torch.ones(2, 4, 6)
    if masking == "blind":
        total[:, :, 2] = 0
    assert torch.allclose(total, value.sum(-1))
    assert torch.autograd.grad(found.outputs.sum(), value)[0].isfinite().all()


@LOADS
@pytest.mark.parametrize("name", ["torchvision", "timm", "timm unfused"])
def test_vision_transformers_give_one_attention_for_each_block(load: Callable[..., HookedProgram], name: str) -> None:
    """With one fused implementation, another, and an explicit softmax; every one has a gradient."""
    if name == "torchvision":
        network: nn.Module = torchvision.models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5)
        nn.init.normal_(network.heads.head.weight)
    else:
        options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
        network = timm.models.VisionTransformer(**options)
        for block in network.blocks:
            block.attn.fused_attn = name == "timm"
    inputs = torch.randn(2, 3, 32, 32)
    program = load(network.eval(), inputs)

    found, values = captured(program, inputs)
    gradients = torch.autograd.grad(found.outputs[:, 1].sum(), values)

    assert [(2, 2, 17, 17)] * 3 == [tuple(value.shape) for value in values]
    assert all(torch.allclose(torch.ones(2, 2, 17), value.sum(-1), atol=1e-5) for value in values)
    assert all(gradient.any() for gradient in gradients)
    assert torch.allclose(program.run(inputs), found.outputs, rtol=1e-4, atol=1e-5)
    one = program.capture([TapName(ATTENTION.path, 1)], inputs, rule=RULE, differentiable=False)
    assert torch.equal(values[1], one.activations[TapName(ATTENTION.path, 1)])
    assert not one.outputs.requires_grad


@LOADS
def test_a_plain_pass_afterwards_has_its_own_bits(load: Callable[..., HookedProgram]) -> None:
    """Nothing of the rule stays, also after a forward that raised."""
    network, inputs = Plain(is_fused=True).eval(), torch.randn(2, 3, 16, 16)
    program = load(network, inputs)
    expected = program.run(inputs)

    captured(program, inputs)
    with pytest.raises(RuntimeError):
        program.capture([ATTENTION], torch.randn(2, 4, 16, 16), rule=RULE)

    assert torch.equal(expected, program.run(inputs))
    assert torch.equal(expected, program.capture([TapName("stem")], inputs).outputs)


@LOADS
def test_models_without_attention_are_refused(load: Callable[..., HookedProgram]) -> None:
    """A softmax over classes is none."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 5), nn.Softmax(dim=-1))
    inputs = torch.randn(2, 3, 8, 8)

    with pytest.raises(Unsupported, match=r"'attention' .*no attention is computed by it.*grad-cam"):
        load(network.eval(), inputs).capture([ATTENTION], inputs, rule=RULE)


def test_attention_within_windows_is_refused() -> None:
    """Its probabilities belong to a window each, and which row that is in only the model knows."""
    network = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=5)

    with pytest.raises(Unsupported, match="as attention within windows has"):
        EagerProgram(network, device=CPU).capture([ATTENTION], torch.randn(2, 3, 32, 32), rule=RULE)


@LOADS
def test_the_tap_needs_its_rule_and_a_call_that_exists(load: Callable[..., HookedProgram]) -> None:
    """Both are said."""
    inputs = torch.randn(2, 3, 16, 16)
    program = load(Plain(is_fused=True).eval(), inputs)

    with pytest.raises(Unsupported, match="under rule 'attention' only, not under 'plain'"):
        program.capture([ATTENTION], inputs)
    with pytest.raises(NotFound, match=r"'@attention#1' does not exist; known: @attention#0"):
        program.capture([TapName(ATTENTION.path, 1)], inputs, rule=RULE)


def test_attention_that_was_exported_as_one_kernel_is_refused() -> None:
    """PyTorch's inference path is one operator; the refusal says how to export without it."""

    class Native(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            weights = (self.layer.in_proj_weight, self.layer.in_proj_bias)
            last = (self.layer.out_proj.weight, self.layer.out_proj.bias)
            return torch._native_multi_head_attention(x, x, x, 8, 2, *weights, *last, None, False)[0].mean(1)  # noqa: FBT003

    inputs = torch.randn(2, 6, 8)
    with torch.no_grad():
        program = ExportProgram(torch.export.export(Native().eval(), (inputs,)), device=CPU)

    with pytest.raises(Unsupported, match="cannot be taken apart; export it again"):
        program.capture([ATTENTION], inputs, rule=RULE)
