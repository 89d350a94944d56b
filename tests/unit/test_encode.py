"""Encoding: what a client can rely on when it reads a heatmap back."""

import dataclasses
import hashlib
import io
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from camserve.server.encode import encode, is_quickly_encoded, needs_source
from camserve.server.errors import ExecutionFailed, InvalidRequest, Unsupported
from camserve.server.jobs import (
    Box,
    Compression,
    Encoding,
    Geometry,
    Heatmap,
    MapSize,
    RawMap,
    RegionOptions,
    ResolvedTarget,
    Score,
    Spec,
)
from camserve.server.overlay import blend, colours
from camserve.server.regions import find_regions
from camserve.server.resize import map_geometry, onto_source, to_size

_GEOMETRY = Geometry(
    source_width=40,
    source_height=30,
    input_width=16,
    input_height=16,
    scale_x=1.5,
    scale_y=1.5,
    offset_x=8.25,
    offset_y=3.25,
)
_SOURCE = np.random.default_rng(5).integers(0, 255, (30, 40, 3), dtype=np.uint8)
_OVERLAYS = [Encoding.OVERLAY_PNG, Encoding.OVERLAY_JPEG, Encoding.OVERLAY_WEBP]


def _raw(values: np.ndarray) -> RawMap:
    target = ResolvedTarget(class_index=3, score=Score.LOGIT, value=1.5)
    return RawMap(
        spec_index=0,
        target=target,
        values=np.ascontiguousarray(values, np.float32),
        raw_min=0.0,
        raw_max=1.0,
        flags=frozenset(),
        layers=("layer4",),
    )


def _spec(encoding: Encoding, size: MapSize = MapSize.LAYER, opacity: float = 0.5) -> Spec:
    return Spec(index=0, method="grad-cam", layers=("layer4",), encoding=encoding, size=size, overlay_opacity=opacity)


def _encode(values: np.ndarray, encoding: Encoding, size: MapSize = MapSize.LAYER, *, opacity: float = 0.5) -> Heatmap:
    return encode(_raw(values), _spec(encoding, size, opacity), label="cat", geometry=_GEOMETRY, source=_SOURCE)


def _read(heatmap: Heatmap) -> np.ndarray:
    """Reads a heatmap back by the words of heatmap.proto."""
    payload = zlib.decompress(heatmap.payload) if heatmap.compression is Compression.ZLIB else heatmap.payload
    assert hashlib.sha256(payload).digest() == heatmap.payload_sha256
    if heatmap.encoding in (Encoding.FLOAT32, Encoding.FLOAT16):
        return np.frombuffer(payload, "<f4" if heatmap.encoding is Encoding.FLOAT32 else "<f2").reshape(heatmap.shape)
    if heatmap.encoding is Encoding.UINT8:
        codes = np.frombuffer(payload, np.uint8).reshape(heatmap.shape)
    else:
        codes = np.asarray(Image.open(io.BytesIO(payload)))
        if heatmap.encoding in _OVERLAYS:
            return codes
    largest = 65_535 if heatmap.encoding is Encoding.PNG16 else 255
    return heatmap.value_min + codes.astype(np.float64) / largest * (heatmap.value_max - heatmap.value_min)


_MAPS = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.floats(-1e4, 1e4, width=32)
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=_MAPS)
def test_codes_are_off_by_half_a_step_at_most(values: np.ndarray) -> None:
    """uint8, PNG8 and PNG16 stand for the value to within half a step; float32 is exact."""
    span = float(values.max()) - float(values.min())
    for encoding, steps in ((Encoding.UINT8, 255), (Encoding.PNG8, 255), (Encoding.PNG16, 65_535)):
        heatmap = _encode(values, encoding)

        assert (float(values.min()), float(values.max())) == (heatmap.value_min, heatmap.value_max)
        assert np.abs(_read(heatmap) - values).max() <= span / steps / 2 * (1 + 1e-9)
    np.testing.assert_array_equal(_read(_encode(values, Encoding.FLOAT32)), values)


@pytest.mark.parametrize("encoding", [Encoding.UINT8, Encoding.PNG8, Encoding.PNG16])
def test_constant_maps_are_zeros_between_equal_bounds(encoding: Encoding) -> None:
    """A constant map has code 0 everywhere, which stands for the constant."""
    heatmap = _encode(np.full((3, 4), 0.7), encoding)

    assert heatmap.value_min == heatmap.value_max == np.float32(0.7)
    assert {float(np.float32(0.7))} == set(_read(heatmap).ravel())


def test_extreme_ranges_do_not_overflow() -> None:
    """Both ends of float32 fit into codes and stay finite."""
    largest = float(np.finfo(np.float32).max)

    assert [[-largest, largest]] == _read(_encode(np.array([[-largest, largest]]), Encoding.UINT8)).tolist()


@pytest.mark.parametrize("values", [[[0.0, 7e4]], [[0.0, 1e-8]], [[1000.0, 1000.25]], [[1e-9, 1e-9]]])
def test_float16_refuses_what_it_would_lose(values: list[list[float]]) -> None:
    """Beyond half's range nothing becomes infinite; below its resolution nothing becomes zero."""
    with pytest.raises(ExecutionFailed, match="ask for float32 or uint8"):
        _encode(np.array(values), Encoding.FLOAT16)


def test_float16_reports_the_range_it_sends() -> None:
    """The bounds beside a float16 map are those of the rounded values."""
    heatmap = _encode(np.array([[0.1, 0.3], [0.2, 2.0]]), Encoding.FLOAT16)

    assert [[np.float16(0.1), np.float16(0.3)], [np.float16(0.2), 2.0]] == _read(heatmap).tolist()
    assert (float(np.float16(0.1)), 2.0) == (heatmap.value_min, heatmap.value_max)


def test_sizes_and_their_geometry() -> None:
    """Layer, input and source size carry the geometry of their own cells."""
    values = np.random.default_rng(0).random((4, 8)).astype(np.float32)
    expected = {
        MapSize.LAYER: (values, map_geometry(_GEOMETRY, 4, 8)),
        MapSize.INPUT: (to_size(values, 16, 16), _GEOMETRY),
        MapSize.SOURCE: (
            onto_source(values, map_geometry(_GEOMETRY, 4, 8)),
            Geometry(source_width=40, source_height=30, input_width=40, input_height=30),
        ),
    }

    for size, (cells, geometry) in expected.items():
        heatmap = _encode(values, Encoding.FLOAT32, size)

        np.testing.assert_array_equal(_read(heatmap), cells)
        assert geometry == heatmap.geometry
        assert (cells.shape, ("h", "w")) == (heatmap.shape, heatmap.axes)
        assert hashlib.sha256(values.astype("<f4").tobytes()).digest() == heatmap.raw_sha256


def test_compression_is_used_only_where_it_helps() -> None:
    """Noise goes plain, smooth maps deflated, files never twice."""
    noise = np.random.default_rng(0).random((7, 7)).astype(np.float32)

    assert Compression.NONE == _encode(noise, Encoding.UINT8).compression
    assert Compression.ZLIB == _encode(np.zeros((7, 7)), Encoding.UINT8).compression
    assert Compression.ZLIB == _encode(noise, Encoding.FLOAT32, MapSize.SOURCE).compression
    assert Compression.NONE == _encode(np.zeros((200, 200)), Encoding.PNG8).compression


@pytest.mark.parametrize("encoding", list(Encoding))
def test_the_same_map_gives_the_same_bytes(encoding: Encoding) -> None:
    """Payloads are hashed into the audit record, so they must not vary."""
    values = np.random.default_rng(0).random((7, 7)).astype(np.float32)

    assert _encode(values, encoding).payload == _encode(values.copy(), encoding).payload


def test_an_overlay_is_drawn_at_source_size() -> None:
    """An overlay implies source size, whatever the spec says, and names its colour axis."""
    values = np.array([[0.0, 1.0]], np.float32)

    heatmap = _encode(values, Encoding.OVERLAY_PNG, MapSize.LAYER, opacity=0.8)

    drawn = onto_source(values, map_geometry(_GEOMETRY, 1, 2))
    expected = blend(_SOURCE, np.rint(drawn * 255).astype(np.uint8), 0.8)
    np.testing.assert_array_equal(_read(heatmap), expected)
    assert ((30, 40, 3), ("h", "w", "c")) == (heatmap.shape, heatmap.axes)
    # Column 0 was cropped away: the picture shows untouched.
    np.testing.assert_array_equal(_read(heatmap)[:, 0], _SOURCE[:, 0])


@pytest.mark.parametrize("encoding", _OVERLAYS)
def test_overlay_files_have_the_format_they_say(encoding: Encoding) -> None:
    """Each overlay is a file of its format and of the source's size."""
    file = Image.open(io.BytesIO(_encode(np.eye(3), encoding).payload))

    assert (encoding.removeprefix("overlay-").upper(), (40, 30)) == (file.format, file.size)
    assert needs_source(_spec(encoding))
    assert not needs_source(_spec(Encoding.PNG8, MapSize.SOURCE))


def test_opacity_follows_the_value() -> None:
    """Opacity 0 leaves the picture; opacity 1 replaces it where the map is largest and leaves it where it is smallest."""
    source = np.full((1, 3, 3), 77, np.uint8)
    codes = np.array([[0, 128, 255]], np.uint8)

    np.testing.assert_array_equal(blend(source, codes, 0.0), source)
    full = blend(source, codes, 1.0)
    assert [[77] * 3, colours()[255].tolist()] == [full[0, 0].tolist(), full[0, 2].tolist()]
    assert np.abs(full[0, 1] - (77 + colours()[128].astype(float)) / 2).max() <= 1


def test_colours_grow_lighter_with_the_value() -> None:
    """The order of values survives a gray print: luma never falls."""
    luma = colours() @ np.array([0.2126, 0.7152, 0.0722])

    assert (np.diff(luma) > -0.5).all()
    assert (256, 3) == colours().shape


@pytest.mark.parametrize("shape", [(9,), (3, 4, 5)])
def test_curves_and_volumes_go_as_their_own_cells(shape: tuple[int, ...]) -> None:
    """1D and 3D maps keep their shape and name their axes; no geometry is claimed."""
    values = np.random.default_rng(0).random(shape).astype(np.float32)

    for encoding in (Encoding.FLOAT32, Encoding.FLOAT16, Encoding.UINT8):
        heatmap = _encode(values, encoding)

        np.testing.assert_allclose(_read(heatmap), values, atol=1 / 255)
        assert (shape, ("t",) if len(shape) == 1 else ("d", "h", "w")) == (heatmap.shape, heatmap.axes)
        assert heatmap.geometry is None


@pytest.mark.parametrize("shape", [(9,), (3, 4, 5), (2, 2, 2, 2)])
@pytest.mark.parametrize(("encoding", "size"), [(Encoding.PNG8, MapSize.LAYER), (Encoding.UINT8, MapSize.INPUT)])
def test_curves_and_volumes_in_picture_forms_are_unsupported(
    shape: tuple[int, ...], encoding: Encoding, size: MapSize
) -> None:
    """What is not a picture is not bent into one."""
    with pytest.raises(Unsupported, match="layer size as float32, float16 or uint8"):
        _encode(np.zeros(shape), encoding, size)


@pytest.mark.parametrize(
    ("encoding", "size"),
    [(Encoding.UINT8, MapSize.SOURCE), (Encoding.OVERLAY_JPEG, MapSize.LAYER), (Encoding.UINT8, MapSize.INPUT)],
)
def test_tensors_have_no_picture_to_draw_on(encoding: Encoding, size: MapSize) -> None:
    """Source size and overlays need an image."""
    with pytest.raises(InvalidRequest, match="needs an image"):
        encode(_raw(np.zeros((2, 2))), _spec(encoding, size), label="", geometry=None)


def test_input_size_of_a_tensor_can_be_told() -> None:
    """A tensor's input has a size though it has no geometry."""
    heatmap = encode(
        _raw(np.eye(2)), _spec(Encoding.FLOAT32, MapSize.INPUT), label="", geometry=None, input_size=(5, 4)
    )

    assert ((5, 4), None) == (heatmap.shape, heatmap.geometry)


def _channels(shape: tuple[int, ...]) -> RawMap:
    """A signed map whose last axis is the input's channels."""
    values = np.random.default_rng(3).standard_normal(shape)
    return dataclasses.replace(_raw(values), has_channels=True)


@pytest.mark.parametrize(
    ("shape", "axes"), [((6, 8, 3), ("h", "w", "c")), ((9, 1), ("t", "c")), ((2, 3, 4, 1), ("d", "h", "w", "c"))]
)
@pytest.mark.parametrize("encoding", [Encoding.FLOAT32, Encoding.FLOAT16, Encoding.UINT8])
def test_signed_channels_go_as_their_own_cells(
    shape: tuple[int, ...], axes: tuple[str, ...], encoding: Encoding
) -> None:
    """The channels come last and are named; a picture's cells still lie on the source."""
    raw = _channels(shape)

    heatmap = encode(raw, _spec(encoding), label="cat", geometry=_GEOMETRY)

    assert (shape, axes) == (heatmap.shape, heatmap.axes)
    span = heatmap.value_max - heatmap.value_min
    np.testing.assert_allclose(_read(heatmap), raw.values, atol=span / 255)
    assert (map_geometry(_GEOMETRY, 6, 8) if len(shape) == 3 else None) == heatmap.geometry


@pytest.mark.parametrize(
    ("encoding", "size"),
    [
        (Encoding.PNG8, MapSize.LAYER),
        (Encoding.PNG16, MapSize.LAYER),
        (Encoding.UINT8, MapSize.INPUT),
        (Encoding.FLOAT32, MapSize.SOURCE),
        (Encoding.OVERLAY_PNG, MapSize.SOURCE),
    ],
)
def test_signed_channels_in_picture_forms_are_unsupported(encoding: Encoding, size: MapSize) -> None:
    """A file has no place for signs, and nothing is resized that is as fine as the input."""
    with pytest.raises(Unsupported, match="signed channels, go at layer size as float32, float16 or uint8"):
        encode(_channels((6, 8, 3)), _spec(encoding, size), label="", geometry=_GEOMETRY, source=_SOURCE)


def test_regions_are_found_on_the_map_as_it_was_made() -> None:
    """Their boxes lie on the source, whatever the size and form in which the map is sent; there are none unless asked for."""
    values = np.zeros((4, 4), np.float32)
    values[1, 2] = 2
    asked = RegionOptions(threshold=0.5)
    expected = find_regions(values, asked, _GEOMETRY)

    assert [(Box(20.0, 9.0, 6.0, 6.0), 2.0, 1.0)] == [(region.box, region.peak, region.share) for region in expected]
    for encoding, size in ((Encoding.UINT8, MapSize.LAYER), (Encoding.OVERLAY_PNG, MapSize.SOURCE)):
        spec = dataclasses.replace(_spec(encoding, size), regions=asked)
        assert expected == encode(_raw(values), spec, label="", geometry=_GEOMETRY, source=_SOURCE).regions
    assert () == _encode(values, Encoding.UINT8).regions


@pytest.mark.parametrize("raw", [_raw(np.ones(9)), _raw(np.ones((2, 2, 2))), _channels((2, 2, 3))])
def test_what_is_no_picture_has_no_regions(raw: RawMap) -> None:
    """They are boxes."""
    spec = dataclasses.replace(_spec(Encoding.UINT8), regions=RegionOptions(threshold=0.5))

    with pytest.raises(Unsupported, match="has no regions"):
        encode(raw, spec, label="", geometry=_GEOMETRY)


def test_a_detection_is_told_on_the_source() -> None:
    """The engine knows only the model's input."""
    target = ResolvedTarget(class_index=3, score=Score.LOGIT, value=0.5, box=Box(4.0, 2.0, 8.0, 4.0), iou=0.75)
    raw = dataclasses.replace(_raw(np.eye(2)), target=target)

    heatmap = encode(raw, _spec(Encoding.UINT8), label="cat", geometry=_GEOMETRY)

    # Column x of the input ends at 1.5 (x - 0.5) + 8.25 + 0.5 of the source.
    assert dataclasses.replace(target, box=Box(14.0, 6.0, 12.0, 6.0)) == heatmap.raw.target
    assert target == encode(raw, _spec(Encoding.UINT8), label="cat", geometry=None).raw.target


def test_a_map_about_no_class_has_no_label() -> None:
    """Whatever the caller of the stage says."""
    raw = dataclasses.replace(_raw(np.eye(2)), target=ResolvedTarget(class_index=None, score=Score.LOGIT, value=0.0))

    assert ("", "cat") == (
        encode(raw, _spec(Encoding.UINT8), label="cat", geometry=None).label,
        _encode(np.eye(2), Encoding.UINT8).label,
    )


def test_an_overlay_too_large_for_its_file_format_is_unsupported() -> None:
    """WebP ends at 16383 pixels a side; the refusal names the format that goes on."""
    geometry = Geometry(source_width=16_384, source_height=1, input_width=16_384, input_height=1)
    source = np.zeros((1, 16_384, 3), np.uint8)

    with pytest.raises(Unsupported, match="overlay-png"):
        encode(_raw(np.eye(2)), _spec(Encoding.OVERLAY_WEBP), label="", geometry=geometry, source=source)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_maps_that_are_not_finite_are_not_sent(bad: float) -> None:
    """The engine's promise is checked where it would leave the house."""
    with pytest.raises(ExecutionFailed, match="not finite"):
        _encode(np.array([[0, bad]]), Encoding.UINT8)


@pytest.mark.parametrize("encoding", [Encoding.UINT8, Encoding.PNG16, Encoding.OVERLAY_PNG])
def test_large_pictures_take_little_more_than_themselves(encoding: Encoding) -> None:
    """Encoding at source size takes no temporary of eight bytes or more for every pixel, and every pixel is still right."""
    height, width = 1_100, 1_300
    geometry = Geometry(
        source_width=width, source_height=height, input_width=224, input_height=224, scale_x=width / 224, scale_y=5
    )
    values = np.random.default_rng(0).random((7, 7)).astype(np.float32)
    source = np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8)
    drawn = onto_source(values, map_geometry(geometry, 7, 7)).astype(np.float64)
    expected = (drawn - drawn.min()) * ((65_535 if encoding is Encoding.PNG16 else 255) / (drawn.max() - drawn.min()))
    tracemalloc.start()

    try:
        heatmap = encode(_raw(values), _spec(encoding, MapSize.SOURCE), label="", geometry=geometry, source=source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 8 * height * width + (16 << 20)
    if encoding is Encoding.OVERLAY_PNG:
        np.testing.assert_array_equal(_read(heatmap), blend(source, np.rint(expected).astype(np.uint8), 0.5))
    else:
        codes = (_read(heatmap) - drawn.min()) / (drawn.max() - drawn.min())
        assert np.abs(codes * (65_535 if encoding is Encoding.PNG16 else 255) - expected).max() <= 0.5 + 1e-6


def test_a_few_cells_are_encoded_at_once() -> None:
    """The map of a last stage takes less than the way to a worker thread and back."""
    assert is_quickly_encoded(_raw(np.ones((7, 7))), Spec(index=0, method="grad-cam", layers=("layer4",)))


@pytest.mark.parametrize(
    "changes",
    [
        {"encoding": Encoding.PNG8},
        {"encoding": Encoding.OVERLAY_JPEG, "size": MapSize.SOURCE},
        {"size": MapSize.INPUT},
        {"size": MapSize.SOURCE},
        {"regions": RegionOptions(threshold=0.5)},
    ],
)
def test_what_is_drawn_or_searched_goes_to_a_worker(changes: dict[str, object]) -> None:
    """Few cells may become many pixels."""
    spec = dataclasses.replace(Spec(index=0, method="grad-cam", layers=("layer4",)), **changes)

    assert not is_quickly_encoded(_raw(np.ones((7, 7))), spec)


def test_many_cells_go_to_a_worker() -> None:
    """A shallow layer's map, compressed, would hold the event loop up."""
    assert not is_quickly_encoded(_raw(np.ones((56, 56))), Spec(index=0, method="grad-cam", layers=("layer1",)))
