"""What a request is said to hold: never less than its parts, and small for what is decoded small."""

import io

import pytest
from PIL import Image

from camserve.server.decode import DecodeLimits, measure
from camserve.server.footprint import held_bytes
from camserve.server.jobs import EncodedImage, JobInput, PixelFormat, RawFrame, TensorInput
from camserve.server.models.recipe import InputRecipe

_PIXELS = 2_000 * 2_000
_RECIPE = InputRecipe.imagenet()


def _image(file_format: str, **options: object) -> EncodedImage:
    file = io.BytesIO()
    Image.new("RGB", (2_000, 2_000)).save(file, file_format, **options)
    return EncodedImage(data=file.getvalue())


def _per_pixel(payload: JobInput, *, keep_source: bool = False, source_size_maps: int = 0) -> float:
    pixels = measure(payload, DecodeLimits())
    held = held_bytes(payload, _RECIPE, pixels=pixels, keep_source=keep_source, source_size_maps=source_size_maps)
    assert held > len(payload.data) + 4 * 3 * 224 * 224
    return (held - len(payload.data)) / pixels


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_pictures_decoded_in_full_count_their_source_and_a_copy(file_format: str) -> None:
    """A kept source of 3 bytes a pixel and Pillow's picture of 4 are held at once."""
    assert _per_pixel(_image(file_format), keep_source=True) >= 7


def test_large_jpegs_decoded_small_count_little() -> None:
    """A photograph for a small model need not fill the door, unless it takes several passes over all coefficients."""
    assert _per_pixel(_image("JPEG")) < 3
    assert _per_pixel(_image("JPEG", progressive=True)) > 8


def test_maps_at_source_size_count() -> None:
    """Drawing is counted beside the source it is drawn on, and a second map beside what was sent of the first."""
    jpeg = _image("JPEG")
    held = [_per_pixel(jpeg, keep_source=True, source_size_maps=maps) for maps in (0, 1, 2, 100)]

    assert held[0] < held[1] < held[2] == held[3]


def test_frames_and_tensors_count() -> None:
    """Frames cost like pictures; a tensor costs its bytes and its row."""
    frame = RawFrame(pixel_format=PixelFormat.MONO8, width=2_000, height=2_000, stride=2_000, data=bytes(_PIXELS))
    tensor = TensorInput(dtype="float32", shape=(3, 224, 224), data=bytes(4 * 3 * 224 * 224))

    assert _per_pixel(frame) >= 7
    assert held_bytes(tensor, _RECIPE, pixels=224 * 224, keep_source=False, source_size_maps=0) < 6 * len(tensor.data)


def test_the_largest_overlay_fits_the_door_by_default() -> None:
    """An overlay on a JPEG of 50 megapixels is said to take less than the 1 GiB held by default."""
    jpeg = _image("JPEG", progressive=True)

    assert 1 << 30 > held_bytes(jpeg, _RECIPE, pixels=50_000_000, keep_source=True, source_size_maps=5)
