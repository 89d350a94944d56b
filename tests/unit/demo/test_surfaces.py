import numpy as np
import pytest

from camserve.server.demo import surfaces
from camserve.server.demo.baseline import histogram_accuracy
from camserve.server.demo.surfaces import (
    LABELS,
    LARGEST_AREA,
    SIZE,
    TEST_FAMILIES,
    TRAINING_FAMILIES,
    Surface,
    make_surface,
)


def test_same_seed_gives_the_same_picture() -> None:
    """Two makings from one seed agree in every byte, for every class and family."""
    for label in range(len(LABELS)):
        for family in TRAINING_FAMILIES + TEST_FAMILIES:
            first, second = make_surface(label, family, (5,)), make_surface(label, family, (5,))
            np.testing.assert_array_equal(first.image, second.image)
            np.testing.assert_array_equal(first.mask, second.mask)


def test_other_seed_gives_another_picture() -> None:
    """The seed matters."""
    assert not np.array_equal(make_surface(0, "wood", (5,)).image, make_surface(0, "wood", (6,)).image)


def test_a_picture_does_not_depend_on_how_many_were_asked_for(held_out: list[Surface]) -> None:
    """The first pictures of a long series are those of a short one."""
    for long, short in zip(held_out, surfaces.test_set(5), strict=False):
        np.testing.assert_array_equal(long.image, short.image)


def test_training_and_test_share_no_family() -> None:
    """The test families are held out, and there are enough of both."""
    assert set() == set(TRAINING_FAMILIES) & set(TEST_FAMILIES)
    assert len(TRAINING_FAMILIES) + len(TEST_FAMILIES) >= 8


def test_test_set_is_balanced(held_out: list[Surface]) -> None:
    """Every test family shows every class equally often."""
    counts = {(family, label): 0 for family in TEST_FAMILIES for label in range(len(LABELS))}
    for surface in held_out:
        counts[surface.family, surface.label] += 1
    assert {10} == set(counts.values())


def test_pictures_have_the_promised_form(held_out: list[Surface]) -> None:
    """Images are RGB bytes and masks are booleans of the same height and width."""
    for surface in held_out:
        assert (SIZE, SIZE, 3) == surface.image.shape
        assert (SIZE, SIZE) == surface.mask.shape
        assert np.dtype(np.uint8) == surface.image.dtype
        assert np.dtype(np.bool_) == surface.mask.dtype


def test_good_surfaces_have_no_flaw_and_flaws_are_small(seen: list[Surface], held_out: list[Surface]) -> None:
    """The mask is empty exactly on good surfaces and covers at most a twentieth of the picture elsewhere."""
    for surface in seen + held_out:
        assert (LABELS[surface.label] == "good") == (not surface.mask.any())
        assert surface.mask.mean() <= LARGEST_AREA


def test_a_flaw_changes_the_picture_where_the_mask_says() -> None:
    """Against the same material without it, a flaw's change is many times greater on the mask than off it."""
    for label in range(1, len(LABELS)):
        for family in TEST_FAMILIES:
            flawed, good = make_surface(label, family, (8, label)), make_surface(0, family, (8, label))
            change = np.abs(flawed.image.astype(float) - good.image).mean(axis=2)
            assert change[flawed.mask].mean() > 4 * change[~flawed.mask].mean(), (LABELS[label], family)


def test_brightness_does_not_tell_the_class(seen: list[Surface], held_out: list[Surface]) -> None:
    """Mean brightness differs between classes by no more than chance allows: four standard errors."""
    every = seen + held_out
    brightness = np.array([surface.image.mean() for surface in every])
    labels = np.array([surface.label for surface in every])
    for label in range(len(LABELS)):
        own = brightness[labels == label]
        error = brightness.std() / np.sqrt(len(own))
        assert own.mean() == pytest.approx(brightness.mean(), abs=4 * error)


def test_colour_alone_does_not_solve_the_problem(seen: list[Surface], held_out: list[Surface]) -> None:
    """Classifiers of the joint colour histogram stay below 0.8."""
    for name, accuracy in histogram_accuracy(seen, held_out).items():
        assert accuracy < 0.8, name
