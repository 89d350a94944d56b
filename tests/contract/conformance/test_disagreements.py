"""Where a library departs from the paper or from itself: what it computes, and that ours, under profile "paper", is the paper's.

`test_oracles.py` proves what the libraries compute; here the server's answer is held against both.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from contract.conformance import formulas, of_captum, of_pytorch_grad_cam, of_torchcam
from contract.conformance.gates import EXACT, enlarged, relative, scaled
from contract.conformance.networks import (
    CASES,
    FLATTENED,
    LOUD,
    OVERWRITTEN,
    POOLED,
    POOLED_MIDDLE,
    RESIDUAL,
    SEVERAL,
    TRANSFORMER,
    Case,
    Question,
)
from contract.conformance.served import Asked, Served

Array = npt.NDArray[Any]

RAW = {"rectify": False}
# What the paper's formula and the library's must at least be apart for the difference to be worth a name.
APART = 0.01


def ours(served: Served, case: Case, question: Question, method: str, **changes: Any) -> Array:
    """Our raw signed map, under the paper's profile unless told otherwise."""
    return served.map(case.network, question, Asked(**{"method": method, "spec": RAW, **changes}))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grad_cam_plus_plus_is_equation_19(served: Served, case: Case) -> None:
    """Not pytorch-grad-cam's with 1e-6 in the denominator, and not torchcam's, which lost the denominator."""
    question = case.question(0)
    seen = formulas.witness(question)

    served_map = ours(served, case, question, "grad-cam++")

    assert relative(formulas.grad_cam_plus_plus(seen), served_map) < EXACT
    assert relative(of_pytorch_grad_cam.RAW["grad-cam++"](question), served_map) > APART
    assert relative(of_torchcam.RAW["grad-cam++"](question), np.maximum(served_map, 0)) > APART


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", ["grad-cam", "hirescam", "layercam"])
def test_profiles_agree_where_libraries_follow_the_paper(served: Served, case: Case, method: str) -> None:
    """No constant in a denominator, no difference: not a bit."""
    question = case.question(0)

    np.testing.assert_array_equal(
        ours(served, case, question, method), ours(served, case, question, method, profile="pytorch-grad-cam")
    )


def test_epsilons_do_not_matter_where_scores_are_large(served: Served) -> None:
    """Loud scores bring the paper's Grad-CAM++ and pytorch-grad-cam's together."""
    question = LOUD.question(0)

    assert relative(of_pytorch_grad_cam.RAW["grad-cam++"](question), ours(served, LOUD, question, "grad-cam++")) < 1e-3


@pytest.mark.parametrize("method", ["grad-cam", "xgrad-cam"])
def test_in_place_operations_behind_a_layer_change_nothing(served: Served, method: str) -> None:
    """We answer for what the layer returned; both libraries read what an in-place ReLU left of it."""
    question = OVERWRITTEN.question(0)
    formula = {"grad-cam": formulas.grad_cam, "xgrad-cam": formulas.xgrad_cam}[method]

    served_map = ours(served, OVERWRITTEN, question, method)

    assert relative(formula(formulas.witness(question)), served_map) < EXACT
    assert relative(of_pytorch_grad_cam.RAW[method](question), served_map) > APART


@pytest.mark.parametrize("case", CASES, ids=str)
def test_score_cam_is_its_official_codes_masks(served: Served, case: Case) -> None:
    """Masks are normalised after enlarging, half-pixel centres, and channels of one value take no share of the softmax."""
    question = case.question(0)

    served_map = ours(served, case, question, "score-cam")

    assert relative(formulas.score_cam_of_varied(question, formulas.witness(question)), served_map) < EXACT


def test_dead_channels_take_most_of_the_libraries_score_cam(served: Served) -> None:
    """A channel that is zero masks the whole image away, and both libraries weigh that black image too."""
    question = POOLED.question(0)
    seen = formulas.witness(question)

    assert not formulas.varied(seen).all()
    assert relative(of_torchcam.RAW["score-cam"](question), ours(served, POOLED, question, "score-cam")) > APART


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_cam_integrates_from_nothing_to_the_mask(served: Served, case: Case) -> None:
    """In shares of 1/10 to 10/10, where torchcam's coefficients accumulate to 5.5."""
    question = case.question(0)
    expected = formulas.score_cam_of_varied(question, formulas.witness(question), np.arange(1, 11) / 10)

    assert relative(expected, ours(served, case, question, "is-cam")) < EXACT


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ablation_cam_sets_channels_to_zero(served: Served, case: Case) -> None:
    """Whatever their signs, and a negative score does not turn the map over as it does in pytorch-grad-cam."""
    question = case.question(0)
    seen = formulas.witness(question)

    served_map = ours(served, case, question, "ablation-cam")

    assert relative(np.sign(seen.score) * formulas.ablation_cam(question, seen), served_map) < 1e-4


def test_ablation_cam_of_signed_channels_is_followed_under_its_profile(served: Served) -> None:
    """There pytorch-grad-cam writes the minimum less 1e7, anew for every row of its batch."""
    question = POOLED_MIDDLE.question(0)
    theirs = of_pytorch_grad_cam.RAW["ablation-cam"](question)

    assert relative(theirs, ours(served, POOLED_MIDDLE, question, "ablation-cam", profile="pytorch-grad-cam")) < 1e-4
    assert relative(theirs, ours(served, POOLED_MIDDLE, question, "ablation-cam")) > APART


@pytest.mark.parametrize("method", ["eigen-cam", "kpca-cam"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_components_point_where_the_activation_is(served: Served, case: Case, method: str) -> None:
    """Ours correlate with the mean activation; pytorch-grad-cam's have whatever sign the solver left."""
    question = case.question(0)

    served_map = ours(served, case, question, method, has_target=False)

    mean = formulas.witness(question).activation.mean(axis=0)
    assert np.corrcoef(mean.ravel(), served_map.ravel())[0, 1] > 0


def test_pytorch_grad_cams_eigen_cam_is_upside_down_on_one_of_these(served: Served) -> None:
    """Its ReLU then keeps what is not there."""
    signs = {
        str(case): float(
            np.sign(
                (
                    of_pytorch_grad_cam.RAW["eigen-cam"](case.question(0))
                    * ours(served, case, case.question(0), "eigen-cam", has_target=False)
                ).sum()
            )
        )
        for case in CASES
    }

    assert -1.0 in signs.values(), signs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fem_counts_outstanding_cells_for_their_channels_mean(served: Served, case: Case) -> None:
    """The paper's binary maps; pytorch-grad-cam weighs whole channels by the share of such cells."""
    question = case.question(0)

    served_map = ours(served, case, question, "fem", has_target=False)

    assert relative(formulas.fem(formulas.witness(question)), served_map) < EXACT
    assert relative(of_pytorch_grad_cam.RAW["fem"](question), served_map) > APART


def test_finer_cam_weighs_similar_classes_as_its_paper_does(served: Served) -> None:
    """Gamma is 0.6 times their mean, as in torchcam; pytorch-grad-cam takes 1, by probabilities that it differentiates."""
    question = RESIDUAL.question(0)
    logits = question.net(question.image)[0].detach()
    nearest = [index for index in (logits - logits[0]).abs().argsort().tolist() if index != 0][:3]
    weights = torch.zeros(len(logits), dtype=torch.float64)
    weights[0], weights[nearest] = 1, -0.6 / 3

    served_map = ours(served, RESIDUAL, question, "finer-cam")

    assert relative(formulas.grad_cam(formulas.witness(question, weights)), served_map) < EXACT
    assert relative(of_pytorch_grad_cam.RAW["finer-cam"](question), served_map) > APART


@pytest.mark.parametrize("rule", ["guided-backprop", "deconvnet"])
@pytest.mark.parametrize("case", [POOLED, FLATTENED, RESIDUAL], ids=str)
def test_every_relu_is_gated(served: Served, case: Case, rule: str) -> None:
    """Functional and in-place ones too, which pytorch-grad-cam and captum leave as they are."""
    question = case.question(0)
    expected = formulas.guided_gradient(question, seen_by="everything", rule=rule.partition("-")[0])

    served_map = ours(served, case, question, rule, has_layers=False, spec={})

    assert relative(expected, served_map) < EXACT
    captums = of_captum.RAW[rule](question)
    assert (relative(captums, served_map) > APART) == (case is RESIDUAL)


def test_guided_grad_cam_is_enlarged_linearly(served: Served) -> None:
    """Captum takes the nearest cell unless told otherwise."""
    question = FLATTENED.question(0)

    blocky = of_captum.at_layer(of_captum.library.GuidedGradCam, question)

    assert relative(blocky, ours(served, FLATTENED, question, "guided-grad-cam", spec={})) > APART


def test_smooth_grad_cam_plus_plus_keeps_the_clean_activation(served: Served) -> None:
    """It averages g, g^2 and g^3 over the copies and draws on A of the input itself; torchcam draws on the last copy's."""
    question = POOLED_MIDDLE.question(0)
    deviation = 0.1 * float(question.image.max() - question.image.min())
    generator = torch.Generator().manual_seed(0)
    copies = [
        formulas.witness(
            dataclasses.replace(
                question, image=question.image + deviation * torch.randn(question.image.shape, generator=generator)
            )
        )
        for _ in range(4)
    ]

    asked = {"parameters": {"samples": 4, "noise": 0.1, "seed": 0}}
    served_map = ours(served, POOLED_MIDDLE, question, "smooth-grad-cam++", **asked)

    expected = formulas.smooth_grad_cam_plus_plus_averaged(copies, formulas.witness(question))
    assert relative(expected, served_map) < 1e-4
    theirs = of_torchcam.smooth(question, deviation)
    assert relative(theirs, np.maximum(served_map, 0)) > APART


def test_refine_cam_of_pytorch_grad_cam_multiplies_at_the_inputs_size(served: Served) -> None:
    """Its map is the product of what it shows for each layer; ours, of the finest layer's size, is made of the same maps."""
    question = SEVERAL.question(0)
    product = np.ones((SEVERAL.side, SEVERAL.side))
    for layer in SEVERAL.layers:
        alone = dataclasses.replace(question, layers=(layer,))
        raw = ours(served, SEVERAL, alone, "grad-cam++", profile="pytorch-grad-cam")
        product = product * scaled(enlarged(scaled(np.maximum(raw, 0)), SEVERAL.side))

    assert relative(of_pytorch_grad_cam.FINISHED["refine-cam"](question), scaled(product)) < EXACT


def test_fullgrad_of_the_paper_is_scaled_over_all_channels_at_once(served: Served) -> None:
    """Pytorch-grad-cam scales each channel by itself: alike, but not the same."""
    question = RESIDUAL.question(0)
    theirs = of_pytorch_grad_cam.FINISHED["fullgrad"](question)

    served_map = scaled(ours(served, RESIDUAL, question, "fullgrad", has_layers=False, spec={}))

    assert np.corrcoef(theirs.ravel(), served_map.ravel())[0, 1] > 0.9
    assert relative(theirs, served_map) > APART


def test_legrad_takes_the_models_own_score(served: Served) -> None:
    """Torchcam puts each layer's tokens through the head; given what lies behind each layer instead, it answers as we do."""
    question = TRANSFORMER.question(0)

    served_map = ours(served, TRANSFORMER, question, "legrad", has_layers=False, spec={})

    blocks = tuple(f"encoder.layers.encoder_layer_{index}" for index in range(3))
    assert relative(of_torchcam.legrad_of_the_models_score(question), served_map) < EXACT
    assert relative(of_torchcam.RAW["legrad"](dataclasses.replace(question, layers=blocks)), served_map) > APART


def test_hirescam_is_rounding_before_a_transformers_last_block(served: Served) -> None:
    """Patches are read through a layer normalisation there: a longer token changes nothing, so that g and A are orthogonal."""
    question = dataclasses.replace(TRANSFORMER.question(0), layers=("encoder.layers.encoder_layer_1",))

    left = ours(served, TRANSFORMER, question, "hirescam")
    parts = ours(served, TRANSFORMER, question, "grad-cam-elementwise")

    assert np.abs(left).max() < 1e-4 * parts.max()


def weights_of(case: Case, values: Array) -> Array:
    """The channel weights that make a map of a layer with more cells than channels."""
    activation = formulas.witness(case.question(0)).activation
    cells = activation.reshape(len(activation), -1).T
    weights, _, rank, _ = np.linalg.lstsq(cells, values.reshape(-1).astype(np.float64), rcond=None)
    assert rank == len(activation)
    return weights


def test_random_cams_weigh_channels_by_chance(served: Served) -> None:
    """Both draw evenly from -1 to 1; ours the same for a seed, and another for another."""
    question = POOLED_MIDDLE.question(0)

    def drawn(seed: int) -> Array:
        asked = {"parameters": {"seed": seed}, "has_target": False}
        return weights_of(POOLED_MIDDLE, ours(served, POOLED_MIDDLE, question, "random-cam", **asked))

    mine = np.concatenate([drawn(seed) for seed in range(40)])
    theirs = np.concatenate(
        [weights_of(POOLED_MIDDLE, of_pytorch_grad_cam.RAW["random-cam"](question)) for _ in range(40)]
    )

    np.testing.assert_array_equal(drawn(7), drawn(7))
    for weights in (mine, theirs):
        # 480 draws: five standard errors of mean and variance.
        assert np.abs(weights).max() <= 1 + 1e-4
        assert abs(weights.mean()) < 5 * np.sqrt(1 / 3 / len(weights))
        assert abs(weights.var() - 1 / 3) < 5 * np.sqrt(4 / 45 / len(weights))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_concepts_explain_the_layer_as_well_as_pytorch_grad_cams(served: Served, case: Case) -> None:
    """Factorisations are not unique: ours, which starts from the same place each time, leaves no larger residual."""
    question = case.question(0)
    activation = formulas.witness(question).activation
    lifted = activation.reshape(len(activation), -1)
    lifted = lifted - lifted.min(axis=1, keepdims=True)

    heatmaps = served.heatmaps(
        case.network,
        question,
        Asked(
            method="deep-feature-factorisation",
            profile="pytorch-grad-cam",
            has_target=False,
            parameters={"concepts": 3},
        ),
    )

    assert 3 == len(heatmaps)
    _, theirs = of_pytorch_grad_cam.concepts(question, 3)
    mine = np.stack([heatmap.values for heatmap in heatmaps])
    assert residual(lifted, mine) <= 1.02 * residual(lifted, theirs)


def residual(matrix: Array, maps: Array) -> float:
    """What the maps leave of a matrix (channels cells) under the best non-negative patterns."""
    places = maps.reshape(len(maps), -1).astype(np.float64)
    patterns = np.full((len(matrix), len(places)), matrix.mean())
    for _ in range(2000):
        patterns *= (matrix @ places.T) / np.maximum(patterns @ (places @ places.T), 1e-30)
    return float(np.linalg.norm(matrix - patterns @ places))
