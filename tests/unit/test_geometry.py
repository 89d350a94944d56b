"""Where the model's input lies on the source: a bright dot is followed there and back."""

import io
import itertools
from typing import Any

import numpy as np
import pytest
from PIL import Image

from camserve.server.decode import DecodeLimits, Region, decode
from camserve.server.jobs import EncodedImage, Geometry, PixelFormat, RawFrame
from camserve.server.models.recipe import InputRecipe
from camserve.server.resize import map_geometry, onto_source

_RECIPES = {
    "stretch": InputRecipe(shape=(3, 32, 47)),
    "stretch-up": InputRecipe(shape=(3, 301, 260)),
    "crop": InputRecipe(shape=(3, 32, 31), resize="crop", resize_size=40),
    "crop-cover": InputRecipe(shape=(3, 33, 48), resize="crop"),
    "crop-padded": InputRecipe(shape=(3, 70, 91), resize="crop", resize_size=40),
    "letterbox": InputRecipe(shape=(3, 45, 45), resize="letterbox", pad_value=20),
    "letterbox-odd": InputRecipe(shape=(3, 33, 64), resize="letterbox"),
}


def _dot(width: int, height: int, x: int, y: int, half: int) -> np.ndarray:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y - half : y + half + 1, x - half : x + half + 1] = 255
    return pixels


def _file(pixels: np.ndarray, file_format: str, orientation: int = 1) -> EncodedImage:
    """Stores upright pixels the way a camera held in that orientation would."""
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    options: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    Image.fromarray(np.ascontiguousarray(stored)).save(file, file_format, exif=exif, **options.get(file_format, {}))
    return EncodedImage(data=file.getvalue())


def _found(tensor: np.ndarray) -> tuple[float, float]:
    """Centre of brightness above the padding's level: (x, y) in input pixels."""
    light = np.asarray(tensor, np.float64)[0]
    light = np.where(light > 0.15, light, 0)
    y, x = np.indices(light.shape)
    return float((light * x).sum() / light.sum()), float((light * y).sum() / light.sum())


def _assert_leads_back(sample_tensor: np.ndarray, geometry: Geometry, x: float, y: float) -> None:
    found_x, found_y = _found(sample_tensor)

    assert abs(geometry.scale_x * found_x + geometry.offset_x - x) <= geometry.scale_x / 2
    assert abs(geometry.scale_y * found_y + geometry.offset_y - y) <= geometry.scale_y / 2


@pytest.mark.parametrize("name", _RECIPES)
@pytest.mark.parametrize("size", [(120, 80), (81, 133), (97, 97)])
def test_a_dot_in_the_input_leads_back_to_the_source(name: str, size: tuple[int, int]) -> None:
    """The dot's place in the input maps to its place in the source, within half an input pixel."""
    width, height = size
    for x, y in [(width // 2, height // 2), (width // 2 - 14, height // 2 + 11), (width // 2 + 17, height // 2 - 13)]:
        sample = decode(_file(_dot(width, height, x, y, 3), "PNG"), _RECIPES[name], DecodeLimits(), keep_source=False)

        assert sample.geometry is not None
        assert (width, height) == (sample.geometry.source_width, sample.geometry.source_height)
        _assert_leads_back(sample.tensor, sample.geometry, x, y)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_first(orientation: int, file_format: str) -> None:
    """However the camera was held, source, tensor and geometry are upright, in every format that can say so."""
    pixels = _dot(90, 61, 60, 21, 3)
    for recipe in (_RECIPES["stretch"], _RECIPES["crop"], _RECIPES["letterbox"]):
        sample = decode(_file(pixels, file_format, orientation), recipe, DecodeLimits(), keep_source=True)

        assert sample.geometry is not None
        assert sample.source is not None
        assert (61, 90, 3) == sample.source.shape
        assert np.abs(sample.source.astype(int) - pixels).max() <= (40 if file_format == "JPEG" else 0)
        _assert_leads_back(sample.tensor, sample.geometry, 60, 21)


@pytest.mark.parametrize(
    ("name", "orientation"), [*(("stretch", orientation) for orientation in range(1, 9)), ("crop", 6), ("letterbox", 3)]
)
def test_jpeg_decoded_at_reduced_size_keeps_its_geometry(name: str, orientation: int) -> None:
    """A large JPEG of odd size, decoded small, gives nearly the tensor of the full decode, and the same geometry."""
    width, height = 1003, 757
    # Smooth light, so that the reduced decode's filter and the full one's agree; the slope shows any shift.
    y, x = np.mgrid[0:height, 0:width]
    hill = 255 * np.exp(-((x - 430) ** 2 + (y - 390) ** 2) / 2 / 90**2)
    pixels = np.repeat(hill[..., None], 3, axis=2).astype(np.uint8)
    recipe = _RECIPES[name]

    reduced = decode(_file(pixels, "JPEG", orientation), recipe, DecodeLimits(), keep_source=False)
    full = decode(_file(pixels, "PNG", orientation), recipe, DecodeLimits(), keep_source=False)

    assert full.geometry == reduced.geometry
    # One input pixel's shift would change the slope's tensor by about 0.15.
    np.testing.assert_allclose(np.asarray(reduced.tensor, float), np.asarray(full.tensor, float), atol=0.02)
    np.testing.assert_allclose(_found(reduced.tensor), _found(full.tensor), atol=0.05)


def test_the_prediction_does_not_depend_on_the_overlay() -> None:
    """Keeping the source gives the same tensor, bit for bit, also where a JPEG is decoded small."""
    payload = _file(_dot(1003, 757, 400, 300, 60), "JPEG", 6)

    without = decode(payload, _RECIPES["stretch"], DecodeLimits(), keep_source=False)
    with_source = decode(payload, _RECIPES["stretch"], DecodeLimits(), keep_source=True)

    np.testing.assert_array_equal(without.tensor, with_source.tensor)
    assert with_source.source is not None
    assert (757, 1003, 3) == with_source.source.shape


@pytest.mark.parametrize("name", _RECIPES)
@pytest.mark.parametrize("size", [(120, 80), (81, 133)])
def test_a_hot_cell_is_drawn_where_the_model_saw_it(name: str, size: tuple[int, int]) -> None:
    """The peak of a one-hot map, drawn on the source, lies within the cell that the geometry gives it."""
    width, height = size
    sample = decode(_file(_dot(width, height, 40, 40, 3), "PNG"), _RECIPES[name], DecodeLimits(), keep_source=False)
    assert sample.geometry is not None
    cells = map_geometry(sample.geometry, 5, 7)

    for row, column in itertools.product(range(5), range(7)):
        values = np.zeros((5, 7), np.float32)
        values[row, column] = 1
        centre_x, centre_y = cells.scale_x * column + cells.offset_x, cells.scale_y * row + cells.offset_y
        if not (0 <= centre_x <= width - 1 and 0 <= centre_y <= height - 1):
            continue  # The cell looks at padding.
        drawn = onto_source(values, cells)
        peak_y, peak_x = np.argwhere(drawn == drawn.max()).mean(axis=0)

        assert (height, width) == drawn.shape
        # At the map's rim values stay at their peak out to the edge, so that the plateau's middle is a quarter cell off.
        assert abs(peak_x - centre_x) <= cells.scale_x / 2 + 0.5
        assert abs(peak_y - centre_y) <= cells.scale_y / 2 + 0.5


def test_regions_look_at_their_part_only() -> None:
    """A region of interest shows its own pixels alone, and its geometry refers to the whole source."""
    pixels = np.full((60, 90, 3), 200, np.uint8)
    pixels[20:40, 30:70] = 10
    pixels[25:28, 50:53] = 255
    region = Region(left=30, top=20, width=40, height=20)

    sample = decode(
        _file(pixels, "PNG"), InputRecipe(shape=(3, 40, 80)), DecodeLimits(), keep_source=True, region=region
    )

    assert sample.geometry is not None
    assert (90, 60) == (sample.geometry.source_width, sample.geometry.source_height)
    # Nothing of the bright surroundings bleeds in.
    assert np.float32(10 / 255) == sample.tensor[0, 0].max()
    _assert_leads_back(sample.tensor, sample.geometry, 51, 26)


def test_frames_have_geometry_too() -> None:
    """A raw frame is placed like an image of its size."""
    frame = RawFrame(
        pixel_format=PixelFormat.RGB8, width=120, height=80, stride=360, data=_dot(120, 80, 70, 33, 3).tobytes()
    )

    sample = decode(frame, _RECIPES["letterbox"], DecodeLimits(), keep_source=False)

    assert sample.geometry is not None
    _assert_leads_back(sample.tensor, sample.geometry, 70, 33)
