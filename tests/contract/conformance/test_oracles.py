"""The oracles are proved first: what each library answers is what its formula, written here a second time in float64, says.

Whatever a library gets wrong is asserted by name, so that an upgrade that mends it is noticed.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from contract.conformance import formulas, of_captum, of_pytorch_grad_cam, of_torchcam
from contract.conformance.gates import relative, up_to_sign
from contract.conformance.networks import CASES, OVERWRITTEN, POOLED, POOLED_MIDDLE, RESIDUAL, SEVERAL, Case

# Float32 against float64; kernels and quotients lose more than sums.
ROUNDING = 5e-6

PYTORCH_GRAD_CAM = {
    "grad-cam": formulas.grad_cam,
    "hirescam": formulas.hirescam,
    "grad-cam-elementwise": formulas.elementwise,
    "grad-cam++": lambda seen: formulas.grad_cam_plus_plus(seen, 1e-6),
    "xgrad-cam": lambda seen: formulas.xgrad_cam(seen, 1e-7),
    "layercam": formulas.layercam,
    "seg-eigen-cam": formulas.seg_eigen_cam,
    "fem": formulas.fem_by_share,
    "shapley-cam": formulas.shapley_cam,
}
COMPONENTS = {
    "eigen-cam": lambda seen: formulas.component(seen.activation),
    "eigen-grad-cam": lambda seen: formulas.component(seen.activation * seen.gradient),
}
TORCHCAM = {
    "grad-cam": formulas.grad_cam,
    "grad-cam++": formulas.grad_cam_plus_plus_cubed,
    "xgrad-cam": lambda seen: formulas.xgrad_cam(seen, 1e-8),
    "layercam": formulas.layercam,
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", PYTORCH_GRAD_CAM)
def test_pytorch_grad_cam_is_its_formula(case: Case, method: str) -> None:
    """Before its ReLU and scaling, to rounding."""
    question = case.question()

    theirs = of_pytorch_grad_cam.RAW[method](question)

    assert relative(PYTORCH_GRAD_CAM[method](formulas.witness(question)), theirs) < ROUNDING


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", COMPONENTS)
def test_pytorch_grad_cams_components_have_any_sign(case: Case, method: str) -> None:
    """They are the first principal component or its opposite."""
    question = case.question()

    theirs = of_pytorch_grad_cam.RAW[method](question)

    assert up_to_sign(COMPONENTS[method](formulas.witness(question)), theirs) < ROUNDING


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pytorch_grad_cams_kernel_component(case: Case) -> None:
    """The sigmoid kernel's, in float32: its small eigenvalues cost digits."""
    question = case.question()

    theirs = of_pytorch_grad_cam.RAW["kpca-cam"](question)

    assert up_to_sign(formulas.kernel_component(formulas.witness(question).activation), theirs) < 1e-4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_score_cams_differ_in_their_masks_only(case: Case) -> None:
    """pytorch-grad-cam aligns corners and normalises after enlarging; torchcam does neither; both drop the baseline."""
    question = case.question()
    seen = formulas.witness(question)

    after, before = of_pytorch_grad_cam.RAW["score-cam"](question), of_torchcam.RAW["score-cam"](question)

    assert relative(formulas.score_cam(question, seen, aligned=True), after) < ROUNDING
    assert relative(np.maximum(formulas.score_cam(question, seen, before=True), 0), before) < ROUNDING


@pytest.mark.parametrize("case", [case for case in CASES if case is not POOLED_MIDDLE], ids=str)
def test_ablations_of_both_libraries_where_nothing_is_negative(case: Case) -> None:
    """Behind a ReLU pytorch-grad-cam sets channels to zero, as the paper does and captum."""
    question = case.question()
    seen = formulas.witness(question)
    expected = formulas.ablation_cam(question, seen)

    by_drop = np.einsum("k,kij->ij", of_captum.ablation(question) / seen.score, seen.activation)

    assert relative(expected, of_pytorch_grad_cam.RAW["ablation-cam"](question)) < ROUNDING
    assert relative(expected, by_drop) < ROUNDING


def test_pytorch_grad_cams_ablation_of_signed_channels() -> None:
    """Where activations are signed it sets channels to their minimum less 1e7 in place of zero: another method."""
    question = POOLED_MIDDLE.question()
    seen = formulas.witness(question)
    expected = formulas.ablation_cam(question, seen)

    theirs = of_pytorch_grad_cam.RAW["ablation-cam"](question)
    by_drop = np.einsum("k,kij->ij", of_captum.ablation(question) / seen.score, seen.activation)

    assert relative(expected, by_drop) < ROUNDING
    assert relative(expected, theirs) > 0.1


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", TORCHCAM)
def test_torchcam_is_its_formula(case: Case, method: str) -> None:
    """After its ReLU, to rounding; Grad-CAM++ is the sum of ReLU(g)^3, because its division is lost."""
    question = case.question()

    theirs = of_torchcam.RAW[method](question)

    assert relative(np.maximum(TORCHCAM[method](formulas.witness(question)), 0), theirs) < ROUNDING


@pytest.mark.parametrize("case", CASES, ids=str)
def test_captum_is_its_formula(case: Case) -> None:
    """Grad-CAM and layer gradient times activation are signed and not scaled."""
    question = case.question()
    seen = formulas.witness(question)

    assert relative(formulas.grad_cam(seen), of_captum.RAW["grad-cam"](question)) < ROUNDING
    assert relative(formulas.hirescam(seen), of_captum.RAW["hirescam"](question)) < ROUNDING


@pytest.mark.parametrize("case", CASES, ids=str)
def test_captums_gradients_at_the_input(case: Case) -> None:
    """dy/dx, and x dy/dx."""
    question = case.question()
    gradient = formulas.input_gradient(question)

    assert relative(gradient, of_captum.RAW["vanilla-backprop"](question)) < ROUNDING
    assert relative(gradient * question.image[0].numpy(), of_captum.RAW["gradient-times-input"](question)) < ROUNDING


def test_neither_library_guides_a_functional_relu() -> None:
    """Both replace modules; in a net of functional ReLUs with one module, only that one is guided."""
    theirs, captums = (
        library.RAW["guided-backprop"](RESIDUAL.question()) for library in (of_pytorch_grad_cam, of_captum)
    )

    np.testing.assert_array_equal(theirs, captums)
    assert relative(formulas.guided_gradient(RESIDUAL.question(), seen_by="modules"), theirs) < ROUNDING
    assert relative(formulas.guided_gradient(RESIDUAL.question(), seen_by="everything"), theirs) > 0.1


def test_pytorch_grad_cam_reads_what_an_in_place_relu_left() -> None:
    """Its activation is a view of the tensor that the ReLU behind the layer overwrites; its gradient is from before."""
    question = OVERWRITTEN.question()
    seen = formulas.witness(question)
    overwritten = dataclasses.replace(seen, activation=np.maximum(seen.activation, 0))

    theirs = of_pytorch_grad_cam.RAW["grad-cam"](question)

    assert relative(formulas.grad_cam(overwritten), theirs) < ROUNDING
    assert relative(formulas.grad_cam(seen), theirs) > 0.1


def test_torchcams_in_place_relu_moves_the_layer() -> None:
    """Its activation and its gradient are both those behind the ReLU."""
    question = OVERWRITTEN.question()
    behind = dataclasses.replace(question, layers=("overwrite",))

    theirs = of_torchcam.RAW["grad-cam"](question)

    assert relative(np.maximum(formulas.grad_cam(formulas.witness(behind)), 0), theirs) < ROUNDING
    assert relative(np.maximum(formulas.grad_cam(formulas.witness(question)), 0), theirs) > 0.1


def test_torchcams_smooth_grad_cam_uses_the_last_noisy_activation() -> None:
    """Its hook is overwritten by each noisy pass: with one sample, the map is made of that sample's activation and gradient."""
    question = POOLED_MIDDLE.question()
    noise = torch.randn(question.image.shape, generator=torch.Generator().manual_seed(0)) * 0.3
    clean = formulas.witness(question)
    noisy = formulas.witness(dataclasses.replace(question, image=question.image + noise))

    theirs = of_torchcam.smooth(question, 0.3, samples=1)

    expected = formulas.smooth_grad_cam_plus_plus([noisy], clean, shown=noisy)
    assert relative(np.maximum(expected, 0), theirs) < ROUNDING
    assert relative(np.maximum(formulas.smooth_grad_cam_plus_plus([noisy], clean, shown=clean), 0), theirs) > 0.01


def test_torchcams_is_cam_scales_inputs_beyond_themselves() -> None:
    """Its coefficients accumulate: 0.1, 0.3, 0.6 … 5.5 in place of the shares of one integral."""
    question = POOLED.question()
    seen = formulas.witness(question)
    accumulated = np.cumsum(np.arange(1, 11) / 10)

    theirs = of_torchcam.RAW["is-cam"](question)

    assert 5.5 == pytest.approx(accumulated[-1])
    assert relative(np.maximum(formulas.integrated_score_cam(question, seen, accumulated), 0), theirs) < ROUNDING


def test_torchcams_fusion_squashes_normalised_maps() -> None:
    """It takes tanh(2 M) of maps that are in [0, 1] already, so that nothing exceeds tanh 2."""
    assert np.tanh(2) == pytest.approx(of_torchcam.fused(SEVERAL.question()).max(), rel=1e-4)


def test_pytorch_grad_cam_answers_one_target_for_two_images_with_an_empty_map() -> None:
    """A short list of targets is cut off silently."""
    question = POOLED.question(class_index=5)
    net = pytorch_grad_cam.GradCAM(question.net, [question.net.get_submodule("features.8")])

    maps = net(question.image.repeat(2, 1, 1, 1), [lambda scores: scores[5]])
    net.activations_and_grads.release()
    question.net.zero_grad()

    assert maps[0].any()
    assert not maps[1].any()
