"""Attention probabilities of TorchScript archives and their gradients, against the formula run eagerly."""
# The models are data: their class docstring, or the test, tells what they are.
# ruff: noqa: D102

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import SwinTransformer, VisionTransformer

from camserve.server.engine.program import ATTENTION, BackwardRule, TapName
from camserve.server.engine.script import ScriptProgram, load_script
from camserve.server.errors import Reason, Unsupported

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # Shapes become constants; batches do not.
HOWS = ["script", "trace"]
RULE = BackwardRule.ATTENTION


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products on two threads of a busy machine wait more than they compute."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def program_of(model: nn.Module, how: str, *, is_fast: bool = False, side: int = 32) -> ScriptProgram:
    """The model scripted or traced, saved and loaded; traced through torch's fast path or not."""
    torch.backends.mha.set_fastpath_enabled(is_fast)
    model = model.eval().requires_grad_(requires_grad=False)
    stream = io.BytesIO()
    example = torch.randn(2, 3, side, side)
    torch.jit.save(torch.jit.script(model) if how == "script" else torch.jit.trace(model, example), stream)
    torch.backends.mha.set_fastpath_enabled(True)
    stream.seek(0)
    return load_script(stream, device=torch.device("cpu"))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002
    scale: float | None = None,
) -> Tensor:
    """Fused attention by its documented formula."""
    assert dropout_p == 0
    scores = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.size(-1)))
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    if attn_mask is not None:
        scores = scores + (attn_mask.float().log() if attn_mask.dtype == torch.bool else attn_mask)
    return scores.softmax(-1) @ value


@contextlib.contextmanager
def seen_attentions() -> Iterator[list[Tensor]]:
    """Inside, every softmax of an eager model is kept, those of fused attention too."""
    kept: list[Tensor] = []
    softmax = Tensor.softmax

    def keeping(*args: Any, **kwargs: Any) -> Tensor:
        kept.append(softmax(*args, **kwargs))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", attend)
        patch.setattr(Tensor, "softmax", keeping)
        yield kept


def relative_difference(expected: Tensor, got: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((expected - got).detach().abs().max() / expected.detach().abs().max())


class Attends(nn.Module):
    """Patches, two attentions of a kind, a linear head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.patches = nn.Conv2d(3, 8, 8, stride=8)
        self.first = nn.Linear(8, 24)
        self.second = nn.Linear(8, 24)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 5)

    def attend(self, x: Tensor, qkv: Tensor) -> Tensor:
        b, n = x.size(0), x.size(1)
        query, key, value = qkv.view(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind == "own":
            attention = (query @ key.transpose(-2, -1) * 0.5).softmax(-1)
            mixed = self.drop(attention) @ value
        elif self.kind == "own, dim 3":
            attention = functional.softmax(torch.matmul(query, key.transpose(-2, -1)), dim=3)
            mixed = torch.matmul(attention.to(value.dtype), value)
        elif self.kind == "causal":
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        elif self.kind == "masked":
            mask = torch.eye(n, dtype=torch.bool).logical_not()
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        elif self.kind == "biased":
            mask = torch.linspace(-1.0, 1.0, n).expand(n, n)
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
        else:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        return x + mixed.transpose(1, 2).reshape(b, n, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.attend(x, self.first(x))
        x = self.attend(x, self.second(x))
        return self.head(x.mean(1))


def vit() -> nn.Module:
    """torchvision's, small: multi-head attention of torch.nn, with its fast path."""
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5
    )
    nn.init.normal_(model.heads.head.weight)
    return model


BUILDS: list[Callable[[], nn.Module]] = [
    vit,
    *(lambda kind=kind: Attends(kind) for kind in ("own", "own, dim 3", "fused", "causal", "masked", "biased")),
]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("build", BUILDS)
def test_probabilities_and_their_gradients_are_those_of_the_formula(build: Callable[[], nn.Module], how: str) -> None:
    """Every attention, in order, for another batch size than was traced; with an input's gradient or without."""
    model, x = build().eval(), torch.randn(3, 3, 32, 32)
    program = program_of(model, how)
    capture = program.capture([ATTENTION], x, rule=RULE)
    leaf = x.clone().requires_grad_()
    with_input = program.capture([ATTENTION], leaf, rule=RULE)
    eager = x.clone().requires_grad_()
    with seen_attentions() as seen:
        expected = model(eager)
    expected_gradients = torch.autograd.grad(expected[:, 1].sum(), [eager, *seen])
    gradients = torch.autograd.grad(capture.outputs[:, 1].sum(), list(capture.activations.values()))
    all_gradients = torch.autograd.grad(with_input.outputs[:, 1].sum(), [leaf, *with_input.activations.values()])

    assert [TapName("@attention", i) for i in range(len(seen))] == list(capture.activations)
    assert {(3, 2)} == {tuple(value.shape[:2]) for value in capture.activations.values()}
    assert [True] + [False] * (len(gradients) - 1) == [value.is_leaf for value in capture.activations.values()]
    for values, grads in (
        (capture.activations.values(), gradients),
        (with_input.activations.values(), all_gradients[1:]),
    ):
        assert max(map(relative_difference, seen, values)) <= 1e-5
        assert max(map(relative_difference, expected_gradients[1:], grads)) <= 1e-5
    assert relative_difference(expected_gradients[0], all_gradients[0]) <= 1e-5
    assert relative_difference(expected, capture.outputs) <= 1e-5
    assert relative_difference(program.run(x), capture.outputs) <= 1e-5


@pytest.mark.parametrize("how", HOWS)
def test_attention_is_tapped_beside_modules_and_one_at_a_time(how: str) -> None:
    """A layer, an operator and one attention by its own name; without a graph if none is wanted."""
    program, x = program_of(Attends("fused"), how), torch.randn(2, 3, 32, 32)
    taps = [TapName("first"), TapName("@attention", 1), TapName("op.softmax")]
    capture = program.capture(taps[:2], x, rule=RULE, differentiable=False)
    every = program.capture([ATTENTION], x, rule=RULE)

    assert taps[:2] == list(capture.activations)
    assert torch.equal(every.activations[taps[1]], capture.activations[taps[1]])
    assert {False} == {value.requires_grad for value in capture.activations.values()}
    assert torch.allclose(torch.ones(2, 2, 16), capture.activations[taps[1]].sum(-1))


def test_other_softmaxes_are_no_attention() -> None:
    """A gate over channels that is multiplied with something is not (b heads n n), and gets no number."""

    class Gated(Attends):
        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = x + self.first(x).softmax(-1) @ torch.ones(24, 8)
            return self.head(self.attend(x, self.second(x)).mean(1)).softmax(-1)

    program = program_of(Gated("own"), "script")
    capture = program.capture([ATTENTION], torch.randn(2, 3, 32, 32), rule=RULE)

    assert [(2, 2, 16, 16)] == [tuple(value.shape) for value in capture.activations.values()]
    assert [TapName("@attention", 0)] == list(capture.activations)


def test_the_fast_path_of_a_trace_is_refused_with_the_way_out() -> None:
    """There is nothing to tap in one kernel; a scripted archive of the same model is led past it."""
    with pytest.raises(Unsupported, match=r"torchscript.*_native_multi_head_attention.*set_fastpath_enabled\(False\)"):
        program_of(vit(), "trace", is_fast=True).capture([ATTENTION], torch.randn(1, 3, 32, 32), rule=RULE)

    scripted = program_of(vit(), "script", is_fast=True)
    capture = scripted.capture([ATTENTION], torch.randn(1, 3, 32, 32), rule=RULE, differentiable=False)
    assert 3 == len(capture.activations)


class Encoder(nn.Module):
    """torch.nn's own transformer layer, with a fast path of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, stride=8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("how", HOWS)
def test_a_transformer_layer_of_torch_is_seen_into(how: str) -> None:
    """Though it could run as one kernel."""
    model, x = Encoder().eval(), torch.randn(2, 3, 32, 32)
    capture = program_of(model, how).capture([ATTENTION], x, rule=RULE)
    with seen_attentions() as seen:
        model(x.requires_grad_())

    assert 1 == len(seen) == len(capture.activations)
    assert relative_difference(seen[0], capture.activations[TapName("@attention", 0)]) <= 1e-5


@pytest.mark.parametrize("how", HOWS)
def test_attention_within_windows_is_refused(how: str) -> None:
    """Its probabilities are not over the tokens of an image."""
    model = SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=5)
    with pytest.raises(Unsupported, match=r"within parts of an image: .*grad-cam") as refused:
        program_of(model, how, side=64).capture([ATTENTION], torch.randn(2, 3, 64, 64), rule=RULE)

    assert Reason.METHOD_UNSUPPORTED_BY_MODEL == refused.value.reason


def test_a_model_without_attention_is_refused() -> None:
    """The message says so and what works instead."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(-1))
    with pytest.raises(
        Unsupported, match=r"torchscript.*computes no attention; grad-cam and vanilla-backprop"
    ) as refused:
        program_of(model, "script").capture([ATTENTION], torch.randn(1, 3, 32, 32), rule=RULE)

    assert Reason.METHOD_UNSUPPORTED_BY_MODEL == refused.value.reason


def test_grouped_heads_and_rows_masked_whole_are_as_the_fused_operator_has_them() -> None:
    """Two heads of queries share one of keys and values; a query that sees nothing gets zeros."""
    query, key, value = torch.randn(2, 4, 5, 3), torch.randn(2, 2, 5, 3), torch.randn(2, 2, 5, 3)
    mask = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    probabilities = torch.ops.camserve.attention_probabilities(
        query, key, mask, is_causal=False, scale=None, is_grouped=True
    )
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)

    assert relative_difference(expected, torch.ops.camserve.attended(probabilities, value, 0.0)) <= 1e-5
    assert not probabilities[:, :, 0].any()
