"""Recipes: what is allowed, and that torchvision's preset comes out as torchvision makes it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from camserve.server.decode import DecodeLimits, decode
from camserve.server.jobs import EncodedImage
from camserve.server.models.recipe import InputRecipe


def _photo(width: int, height: int) -> Image.Image:
    """A picture with smooth and sharp parts, the same every time."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 7) * 90 + 128, np.cos(y / 5) * 90 + 128, ((x // 9 + y // 11) % 2) * 255], axis=-1)
    return Image.fromarray(waves.astype(np.uint8))


def _png(image: Image.Image) -> EncodedImage:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return EncodedImage(data=file.getvalue())


@pytest.mark.parametrize("size", [(500, 333), (333, 500), (257, 256), (224, 224), (100, 60), (640, 97)])
def test_imagenet_preset_is_torchvisions(size: tuple[int, int]) -> None:
    """Resize 256, crop 224 and ImageNet statistics give what torchvision gives for the same PIL image."""
    recipe = InputRecipe.imagenet()
    image = _photo(*size)
    resized = functional.center_crop(functional.resize(image, [256]), [224, 224])
    scaled = functional.to_dtype(functional.pil_to_tensor(resized), torch.float32, scale=True)
    expected = functional.normalize(scaled, list(recipe.mean), list(recipe.std)).numpy()

    tensor = decode(_png(image), recipe, DecodeLimits(), keep_source=False).tensor

    np.testing.assert_allclose(np.asarray(tensor, np.float32), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_stretch_is_torchvisions_resize(interpolation: str) -> None:
    """A stretch with each filter agrees with torchvision's resize of a PIL image to a fixed size."""
    recipe = InputRecipe(shape=(3, 40, 64), interpolation=interpolation)  # type: ignore[arg-type]  # From the list above.
    image = _photo(211, 97)
    resized = functional.resize(image, [40, 64], interpolation=InterpolationMode(interpolation))
    expected = functional.to_dtype(functional.pil_to_tensor(resized), torch.float32, scale=True).numpy()

    tensor = decode(_png(image), recipe, DecodeLimits(), keep_source=False).tensor

    np.testing.assert_allclose(np.asarray(tensor, np.float32), expected, rtol=0, atol=1e-6)


def test_crop_larger_than_the_resized_image_pads_as_torchvision() -> None:
    """A crop that sticks out is padded on the same sides as torchvision's."""
    recipe = InputRecipe(shape=(3, 65, 50), resize="crop", resize_size=32)
    image = _photo(64, 40)
    resized = functional.center_crop(functional.resize(image, [32]), [65, 50])
    expected = functional.to_dtype(functional.pil_to_tensor(resized), torch.float32, scale=True).numpy()

    tensor = decode(_png(image), recipe, DecodeLimits(), keep_source=False).tensor

    np.testing.assert_allclose(np.asarray(tensor, np.float32), expected, rtol=0, atol=1e-6)


def test_bgr_reverses_channels_before_statistics() -> None:
    """Mean and std are in the model's channel order, blue first for bgr."""
    recipe = InputRecipe(shape=(3, 1, 1), channels="bgr", scale=1, mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0))
    red_green_blue = Image.fromarray(np.array([[[11, 22, 33]]], np.uint8))

    tensor = decode(_png(red_green_blue), recipe, DecodeLimits(), keep_source=False).tensor

    assert [32.0, 10.0, 2.0] == tensor.ravel().tolist()


def test_gray_uses_the_luma_of_colour_pictures() -> None:
    """A one-channel model sees ITU-R 601 luma, as Pillow and torchvision compute it."""
    recipe = InputRecipe(shape=(1, 1, 1), channels="gray", dtype="uint8", scale=1)
    pixel = Image.fromarray(np.array([[[200, 100, 50]]], np.uint8))

    tensor = decode(_png(pixel), recipe, DecodeLimits(), keep_source=False).tensor

    assert [[[124]]] == tensor.tolist()
    assert np.uint8 == tensor.dtype


def test_letterbox_fills_with_the_pad_value() -> None:
    """What a letterbox leaves open holds the pad value, normalised like any pixel."""
    recipe = InputRecipe(shape=(3, 8, 8), resize="letterbox", pad_value=114, scale=1)

    tensor = decode(_png(Image.new("RGB", (16, 8), "white")), recipe, DecodeLimits(), keep_source=False).tensor

    assert [114.0] * 2 + [255.0] * 4 + [114.0] * 2 == tensor[0, :, 3].tolist()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"shape": ()}, "at least one size"),
        ({"shape": (3, 0, 4)}, "1 or more"),
        ({"shape": (1, 4, 4)}, "takes (3, height, width)"),
        ({"shape": (3, 4)}, "channels 'none'"),
        ({"resize": "squash"}, "allowed: stretch, crop, letterbox"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"channels": "rgba"}, "allowed: rgb, bgr, gray, none"),
        ({"dtype": "int8"}, "allowed: float32"),
        ({"resize_size": 256}, "belongs to resize 'crop'"),
        ({"resize": "crop", "resize_size": 0}, "1 or more"),
        ({"mean": (0.5, 0.5)}, "one for each channel"),
        ({"mean": (float("nan"),)}, "finite"),
        ({"std": (0.0,)}, "above 0"),
        ({"scale": 0.0}, "not 0"),
        ({"pad_value": 256}, "0 to 255"),
        ({"dtype": "uint8"}, "scale must be 1"),
    ],
)
def test_senseless_recipes_are_refused(arguments: dict[str, object], says: str) -> None:
    """A recipe that makes no sense says what is allowed."""
    with pytest.raises(ValueError, match=r".") as refusal:
        InputRecipe(**({"shape": (3, 4, 4)} | arguments))  # type: ignore[arg-type]  # Wrong on purpose.

    assert says in str(refusal.value)


def test_lists_become_tuples() -> None:
    """Cards give lists; recipes are hashable."""
    recipe = InputRecipe(shape=[3, 4, 4], mean=[0.5])  # type: ignore[arg-type]  # As TOML gives them.

    assert ((3, 4, 4), (0.5,)) == (recipe.shape, recipe.mean)
    assert isinstance(hash(recipe), int)
