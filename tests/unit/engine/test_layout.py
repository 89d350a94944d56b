from collections.abc import Sequence

import pytest
import torch

from camserve.server.engine.layout import Layout, LayoutKind, channels_first, detect_layout
from camserve.server.errors import Reason, Unsupported

FIRST, LAST, TOKENS = LayoutKind.CHANNELS_FIRST, LayoutKind.CHANNELS_LAST, LayoutKind.TOKENS


@pytest.mark.parametrize(
    ("kind", "grid", "shape", "input_shape", "other"),
    [
        pytest.param(FIRST, (40,), (2, 8, 40), (2, 3, 80), ((1, 8, 32), (1, 3, 64)), id="signal"),
        pytest.param(LAST, (40,), (2, 40, 8), (2, 3, 80), ((1, 32, 8), (1, 3, 64)), id="signal channels last"),
        pytest.param(
            FIRST, (7, 7), (2, 7, 7, 7), (2, 3, 224, 224), ((1, 7, 4, 4), (1, 3, 128, 128)), id="cube, two sizes"
        ),
        pytest.param(LAST, (7, 7), (2, 7, 7, 7), (2, 3, 224, 224), ((1, 4, 4, 7), (1, 3, 128, 128)), id="cube, NHWC"),
        pytest.param(FIRST, (4, 8, 8), (2, 16, 4, 8, 8), (2, 1, 16, 32, 32), None, id="volume"),
        pytest.param(FIRST, (7, 7), (2, 512, 7, 7), (2, 3, 224, 224), None, id="image, one size"),
        pytest.param(LAST, (7, 7), (2, 7, 7, 768), (2, 3, 224, 224), None, id="Swin, one size"),
        pytest.param(FIRST, (3, 5), (2, 64, 3, 5), (2, 3, 96, 160), None, id="not square"),
        pytest.param(
            FIRST, (7, 7), (2, 512, 7, 7), (2, 3, 96, 96), ((1, 512, 7, 7), (1, 3, 64, 64)), id="adaptive pool"
        ),
        pytest.param(FIRST, (1, 1), (2, 512, 1, 1), (2, 3, 96, 96), ((1, 512, 1, 1), (1, 3, 64, 64)), id="global pool"),
    ],
)
def test_a_map_is_read_from_what_space_does(
    kind: LayoutKind,
    grid: tuple[int, ...],
    shape: Sequence[int],
    input_shape: Sequence[int],
    other: tuple[Sequence[int], Sequence[int]] | None,
) -> None:
    """Channels stay when the input size changes; with one size, space has shrunk evenly."""
    layout = detect_layout(shape, input_shape, other=other)

    assert (kind, grid, 0) == (layout.kind, layout.grid, layout.prefix)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(("grid", "space"), [((14, 14), (224, 224)), ((6, 10), (96, 160)), ((13, 13), (220, 220))])
def test_tokens_are_prefix_and_grid(prefix: int, grid: tuple[int, ...], space: Sequence[int]) -> None:
    """A sequence is split into the tokens of no place and a grid in the input's proportions."""
    count = prefix + grid[0] * grid[1]

    layout = detect_layout((2, count, 192), (2, 3, *space))

    assert Layout(kind=TOKENS, grid=grid, channels=192, prefix=prefix) == layout


@pytest.mark.parametrize(
    ("shape", "input_shape", "said"),
    [
        pytest.param((2, 1000), (2, 3, 224, 224), "no axes", id="vector"),
        pytest.param((2, 7, 7, 7), (2, 3, 224, 224), "both", id="cube"),
        pytest.param((2, 8, 40), (2, 3, 80), "both", id="signal"),
        pytest.param((128, 49, 96), (2, 3, 224, 224), "not the batch", id="windows"),
        pytest.param((2, 512, 3, 9), (2, 3, 96, 96), "neither", id="no common stride"),
        pytest.param((2, 196, 1024), (2, 3, 224, 224), "(b, n, c) and (b, c, n)", id="both axes fit"),
        pytest.param((2, 9, 23), (2, 3, 96, 96), "0 + 3x3 or 5 + 2x2", id="two grids"),
        pytest.param((2, 768, 100), (2, 3, 224, 224), "not (b, prefix + cells, c)", id="no grid"),
    ],
)
def test_an_ambiguous_shape_is_refused_with_what_is_ambiguous(
    shape: Sequence[int], input_shape: Sequence[int], said: str
) -> None:
    """Nothing is guessed: a map with its axes swapped would look plausible."""
    with pytest.raises(Unsupported) as refused:
        detect_layout(shape, input_shape)

    assert Reason.LAYER_UNUSABLE == refused.value.reason
    assert said in refused.value.message


def test_what_else_the_model_shows_settles_a_token_grid() -> None:
    """A grid seen in the patch embedding and a sequence length seen elsewhere decide between readings."""
    by_grid = detect_layout((2, 9, 23), (2, 3, 96, 96), grids={(3, 3)})
    by_count = detect_layout((2, 196, 1024), (2, 3, 224, 224), token_counts={196})

    assert (0, (3, 3)) == (by_grid.prefix, by_grid.grid)
    assert (14, 14) == by_count.grid


def test_attention_weights_are_not_a_map() -> None:
    """(b, heads, n, n) is square like a map, and is refused once the sequence length is known."""
    with pytest.raises(Unsupported, match="attention"):
        detect_layout((2, 12, 197, 197), (2, 3, 224, 224), token_counts={197})


def test_channels_first_folds_every_layout_to_the_same_values() -> None:
    """NHWC and tokens hold what (b, c, h, w) holds, cell by cell; prefix tokens are dropped."""
    value = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    tokens = torch.cat([torch.full((2, 2, 3), -1.0), value.flatten(2).transpose(1, 2)], dim=1)

    first = channels_first(value, Layout(kind=FIRST, grid=(4, 5), channels=3))
    last = channels_first(value.movedim(1, -1), Layout(kind=LAST, grid=(4, 5), channels=3))
    folded = channels_first(tokens, Layout(kind=TOKENS, grid=(4, 5), channels=3, prefix=2))

    assert torch.equal(value, first)
    assert torch.equal(value, last)
    assert torch.equal(value, folded)


def test_channels_first_refuses_a_value_of_another_layout() -> None:
    """A sequence of another length is not folded into the wrong grid; nor is what has other channels or axes."""
    tokens = Layout(kind=TOKENS, grid=(4, 4), channels=3, prefix=1)
    with pytest.raises(Unsupported, match=r"has 18 tokens for this input.*1 \+ 4 x 4 only"):
        channels_first(torch.zeros(2, 18, 3), tokens)
    for value in (torch.zeros(2, 17, 5), torch.zeros(2, 3, 4, 4)):
        with pytest.raises(Unsupported, match="does not have the layout"):
            channels_first(value, tokens)


def test_a_model_with_a_size_of_its_own_has_square_maps():
    """SSD brings 64 x 96 pixels to 320 x 320: no stride leads from one to the other, and the square axes are space."""
    layout = detect_layout((2, 672, 20, 20), (2, 3, 64, 96), has_own_size=True)

    assert (LayoutKind.CHANNELS_FIRST, (20, 20), 672) == (layout.kind, layout.grid, layout.channels)
    with pytest.raises(Unsupported, match="can be neither"):
        detect_layout((2, 672, 20, 20), (2, 3, 64, 96))
    with pytest.raises(Unsupported, match="can be both"):
        detect_layout((2, 20, 20, 20), (2, 3, 64, 96), has_own_size=True)
