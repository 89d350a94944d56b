from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from camserve.client import Box, CorruptPayload, Detection, Geometry, Heatmap, HeatRegion, ResolvedTarget
from camserve.client.geometry import resize
from camserve.client.heatmaps import heatmap_from_proto
from camserve.client.inputs import AnyInput, TensorInput, prepare
from camserve.client.overlays import COLORMAPS, colourise, unit_range
from camserve.v1 import heatmap_pb2, input_pb2
from tests.unit.client.conftest import heatmap

ROW = np.array([[0.0, 10.0]], np.float32)


def _heatmap(
    values: npt.NDArray[np.float32] = ROW, source: tuple[int, int] | None = (4, 1), image: AnyInput | None = None
) -> Heatmap:
    return heatmap_from_proto(heatmap(values, source).heatmap, None if image is None else prepare(image))


def test_a_map_over_the_whole_source_is_linear_between_centres_and_flat_at_the_edges() -> None:
    """Two cells on four pixels: centres at x = 0.5 and 2.5, so the pixels read 0, a quarter, three quarters, 1 of the way."""
    assert [[0.0, 2.5, 7.5, 10.0]] == _heatmap().on_source().tolist()


def test_pixels_the_model_did_not_see_carry_the_smallest_value() -> None:
    """A centre crop: cells of two pixels at x = 2.5 and 4.5 see x from 1.5 to 5.5; 0, 1, 6 and 7 lie outside."""
    geometry = Geometry(scale_x=2, offset_x=2.5, scale_y=1, offset_y=0, source_width=8, source_height=1)

    placed = geometry.place(np.array([[5.0, 10.0]], np.float32))

    # x = 2 and 5 lie beyond the centres but in the cells: flat. x = 3 and 4 lie 1/4 and 3/4 between them.
    assert [[5.0, 5.0, 5.0, 6.25, 8.75, 10.0, 5.0, 5.0]] == placed.tolist()


def test_the_border_of_the_seen_area_belongs_to_it() -> None:
    """A cell coordinate of exactly -0.5 is seen."""
    geometry = Geometry(scale_x=1, offset_x=0.5, scale_y=1, offset_y=1, source_width=3, source_height=2)

    placed = geometry.place(np.array([[3.0, 5.0], [1.0, 1.0]], np.float32))

    # u = -0.5, 0.5, 1.5 are all seen; v = -1 is not, v = 0 is the first row.
    assert [[1.0, 1.0, 1.0], [3.0, 4.0, 5.0]] == placed.tolist()


def test_letterboxed_maps_extend_beyond_the_source() -> None:
    """Padding rows of the model's input have cells but no pixels."""
    geometry = Geometry(scale_x=1, offset_x=0, scale_y=1, offset_y=-1, source_width=1, source_height=1)

    assert [[7.0]] == geometry.place(np.array([[1.0], [7.0], [2.0]], np.float32)).tolist()


def test_resizing_is_bilinear_with_half_pixel_centres() -> None:
    """The same rule as on the source, without geometry; shrinking reads between the centres, too."""
    assert [[0.0, 2.5, 7.5, 10.0]] == _heatmap().resized(1, 4).tolist()
    assert [[5.0]] == _heatmap().resized(1, 1).tolist()
    assert ROW.tolist() == resize(ROW, 1, 2).tolist()
    with pytest.raises(ValueError, match="at least one row"):
        resize(ROW, 0, 4)


def test_a_tensor_has_no_source_to_lie_on() -> None:
    """The text says what to use instead."""
    with pytest.raises(ValueError, match=r"resized\(height, width\)"):
        _heatmap(source=None).on_source()


def test_values_are_decoded_once_checked_and_read_only() -> None:
    """Nobody's in-place arithmetic may change what the server said."""
    item = _heatmap()

    assert item.values is item.values
    assert (1, 2) == (item.height, item.width)
    with pytest.raises(ValueError, match="read-only"):
        item.values[0, 0] = 1


def test_corrupt_maps_are_told_when_they_are_looked_at() -> None:
    """Receiving one does no harm; reading it raises."""
    message = heatmap(ROW).heatmap
    message.payload_sha256 = bytes(32)

    item = heatmap_from_proto(message)

    with pytest.raises(CorruptPayload):
        _ = item.values


def test_an_overlay_uses_the_picture_that_was_sent() -> None:
    """Opacity 0 is the picture; opacity 1 is the colour alone where the map is largest and the picture where it is smallest."""
    picture = Image.new("RGB", (4, 1), (10, 20, 30))
    item = _heatmap(image=picture)

    plain, colours = item.overlay(opacity=0), item.overlay(opacity=1, colormap="inferno")

    assert [[[10, 20, 30]] * 4] == np.asarray(plain).tolist()
    assert [10, 20, 30] == np.asarray(colours)[0, 0].tolist()
    assert [0xFC, 0xFF, 0xA4] == np.asarray(colours)[0, 3].tolist()


def test_overlays_follow_exif_orientation() -> None:
    """A camera held upright writes a turned picture; the map belongs to what a person sees."""
    exif = Image.Exif()
    exif[0x0112] = 6  # Turn a quarter clockwise to view.
    file = io.BytesIO()
    Image.new("RGB", (6, 4)).save(file, "JPEG", exif=exif)

    assert (4, 6) == _heatmap(source=(4, 6), image=file.getvalue()).overlay().size


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((1, 4), 200, np.uint8), 200),
        (np.full((1, 4, 3), 200, np.uint8), 200),
        (np.full((1, 4), 200 * 256, np.uint16), 200),
    ],
    ids=["mono8", "rgb8", "mono16"],
)
def test_arrays_are_shown_at_their_own_brightness(array: npt.NDArray[np.uint8], expected: int) -> None:
    """Sixteen bits are scaled to eight, not cut off."""
    assert [[[expected] * 3] * 4] == np.asarray(_heatmap(image=array).overlay(opacity=0)).tolist()


def test_sixteen_bit_files_are_shown_at_their_own_brightness() -> None:
    """The same for PNG files."""
    file = io.BytesIO()
    Image.fromarray(np.full((1, 4), 200 * 256, np.uint16)).save(file, "PNG")

    assert [200] * 3 == np.asarray(_heatmap(image=file.getvalue()).overlay(opacity=0))[0, 0].tolist()


def test_a_picture_of_another_size_is_refused() -> None:
    """A map shifted by a resize would mislead."""
    with pytest.raises(ValueError, match="4 x 1 pixels, this picture has 5 x 5"):
        _heatmap().overlay(Image.new("RGB", (5, 5)))
    with pytest.raises(ValueError, match=r"overlay\(image\)"):
        _heatmap(image=TensorInput(np.zeros((3, 4, 4), np.float32))).overlay()


def test_overlays_are_saved_in_the_format_the_suffix_names(tmp_path: Path) -> None:
    """The path comes back, and holds a picture of the source's size."""
    path = _heatmap(image=Image.new("RGB", (4, 1))).save_overlay(tmp_path / "why.png")

    with Image.open(path) as saved:
        assert ("PNG", (4, 1)) == (saved.format, saved.size)


def test_an_overlay_made_by_the_server_is_given_as_it_is() -> None:
    """Nothing is drawn over it again."""
    file = io.BytesIO()
    Image.new("RGB", (4, 1), (1, 2, 3)).save(file, "PNG")
    item = heatmap_from_proto(
        heatmap_pb2.Heatmap(
            encoding="ENCODING_OVERLAY_PNG",
            shape=[1, 4, 3],
            payload=file.getvalue(),
            payload_sha256=hashlib.sha256(file.getvalue()).digest(),
        )
    )

    assert item.is_overlay
    assert [1, 2, 3] == np.asarray(item.overlay())[0, 0].tolist()


def test_flags_and_target_are_words_and_numbers() -> None:
    """What to know before trusting a map can be read without the enum."""
    message = heatmap(ROW, flags=["MAP_FLAG_NEGATIVE_ONLY", "MAP_FLAG_EMPTY"], layers=["layer2"]).heatmap

    item = heatmap_from_proto(message)

    assert {"negative-only", "empty"} == item.flags
    assert ("scratch", 1, "logit", 1.5) == (
        item.target.name, item.target.class_index, item.target.score, item.target.value
    )  # fmt: skip
    assert (("layer2",), "paper", 0.0, 10.0) == (item.layers, item.profile, item.raw_min, item.raw_max)


def test_colormaps_run_from_their_first_anchor_to_their_last() -> None:
    """Each has 256 steps between."""
    for name, anchors in COLORMAPS.items():
        ends = colourise(np.array([0.0, 1.0], np.float32), name)
        assert [anchors[0], anchors[-1]] == [bytes(end).hex() for end in ends]
    with pytest.raises(ValueError, match="there are turbo"):
        colourise(ROW, "jet")


def test_enlarging_keeps_a_constant_map_constant() -> None:
    """Rounding must not draw evidence where there is none."""
    constant = np.full((3, 3), 0.1, np.float32)

    assert {np.float32(0.1)} == set(resize(constant, 50, 70).ravel())


def test_a_constant_map_points_nowhere() -> None:
    """It is drawn in the lowest colour, not divided by zero."""
    assert [[0.0, 0.0]] == unit_range(np.array([[3.0, 3.0]], np.float32)).tolist()


def _with_target(**fields: object) -> ResolvedTarget:
    message = heatmap().heatmap
    message.ClearField("target")
    message.target.CopyFrom(heatmap_pb2.ResolvedTarget(**fields))  # type: ignore[arg-type]
    return heatmap_from_proto(message).target


@pytest.mark.parametrize(
    ("fields", "name", "description"),
    [
        ({"class_index": 0, "score": "SCORE_LOGIT", "polarity": "POLARITY_FOR"}, "0", "0"),
        ({"class_index": 1, "label": "cat", "polarity": "POLARITY_AGAINST"}, "cat", "against cat"),
        ({"class_index": 1, "label": "cat", "other_class_index": 0}, "cat", "cat rather than 0"),
        ({"class_index": 1, "step": 0}, "1", "1, step 1"),
        ({"class_index": 1, "cells": 12}, "1", "1, 12 cells"),
        ({"class_index": 1, "iou": 0.5}, "1", "1, IoU 0.50"),
        ({"concept": 0}, "concept 1", "concept 1"),
        ({"phrase": "a cat"}, "a cat", "a cat"),
        ({}, "", "no class"),
    ],
)
def test_targets_tell_what_a_map_is_about(fields: dict[str, object], name: str, description: str) -> None:
    """Zeros are told, and what is unset is None."""
    target = _with_target(**fields)

    assert (name, description) == (target.name, target.description)
    for field in ("class_index", "other_class_index", "step", "cells", "iou", "concept"):
        assert fields.get(field) == getattr(target, field)


def test_a_matched_detection_is_told_whole() -> None:
    """Box, class and score."""
    box = input_pb2.Box(left_pixels=1, top_pixels=2, width_pixels=3, height_pixels=4)
    sent = heatmap_pb2.Detection(box=box, class_index=3, label="crane", score=0.5)

    expected = Detection(box=Box(1, 2, 3, 4), class_index=3, label="crane", score=0.5)
    assert expected == _with_target(class_index=3, detection=sent).detection
    assert _with_target(class_index=3).detection is None


def test_regions_and_what_was_done_are_told() -> None:
    """Strongest first, as they came."""
    box = input_pb2.Box(left_pixels=1, top_pixels=2, width_pixels=3, height_pixels=4)
    region = heatmap_pb2.HeatRegion(box=box, peak=2, share=0.5)

    item = heatmap_from_proto(heatmap(regions=[region], completed=0.25).heatmap)

    assert (HeatRegion(box=Box(1, 2, 3, 4), peak=2.0, share=0.5),) == item.regions
    assert (0.25, ("h", "w")) == (item.completed, item.axes)


SIGNED = np.array([[[1, -1, 0], [0, 2, -4]]], np.float32)


def test_signed_channels_are_kept_apart_and_can_be_added_up() -> None:
    """The magnitudes 2 and 6, of which the larger is clipped at the 99th percentile, as the server's gray is."""
    item = heatmap_from_proto(
        heatmap(SIGNED, (2, 1), axes=["h", "w", "c"]).heatmap, prepare(np.zeros((1, 2), np.uint8))
    )

    assert (True, 1, 2) == (item.has_channels, item.height, item.width)
    assert SIGNED.tolist() == item.values.tolist()
    np.testing.assert_allclose(item.strength, [[2.0, 5.96]], rtol=1e-6)
    assert item.strength.tolist() == item.on_source().tolist()
    assert (2, 1) == item.overlay().size


def test_signed_pictures_have_gray_for_nothing() -> None:
    """Three channels are colours; one is red for evidence and blue for evidence against; the largest magnitude is full."""

    def shown(values: npt.NDArray[np.float32], axes: list[str]) -> list[list[list[int]]]:
        picture = heatmap_from_proto(heatmap(values, None, axes=axes).heatmap).signed_picture()
        return np.asarray(picture).tolist()

    assert [[[159, 96, 128], [128, 191, 0]]] == shown(SIGNED, ["h", "w", "c"])
    one = [[[255, 0, 0], [128, 128, 128], [64, 64, 191]]]
    assert one == shown(np.array([[[2.0], [0.0], [-1.0]]], np.float32), ["h", "w", "c"])
    assert one == shown(np.array([[2.0, 0.0, -1.0]], np.float32), ["h", "w"])
    assert [[[128, 128, 128]]] == shown(np.zeros((1, 1), np.float32), ["h", "w"])


@pytest.mark.parametrize(("shape", "axes"), [((5,), ["t"]), ((2, 3, 4), ["d", "h", "w"])])
def test_what_is_no_picture_is_not_drawn_as_one(shape: tuple[int, ...], axes: list[str]) -> None:
    """Its values are there all the same."""
    item = heatmap_from_proto(heatmap(np.ones(shape, np.float32), None, axes=axes).heatmap)

    assert shape == item.values.shape
    for draw in (item.signed_picture, lambda: item.resized(4, 4), lambda: item.overlay(np.zeros((4, 4), np.uint8))):
        with pytest.raises(ValueError, match="is no picture; look at its values"):
            draw()


def test_a_signal_has_no_width() -> None:
    """The text tells the axes it has."""
    item = heatmap_from_proto(heatmap(np.ones(5, np.float32), None, axes=["t"]).heatmap)

    with pytest.raises(ValueError, match="axes are t: it has no 'w'"):
        _ = item.width
