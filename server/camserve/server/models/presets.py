"""What a library publishes beside its pretrained weights: labels and preprocessing, for fields that a card leaves open.

Called by `loader.py`. A pretrained model fed with other preprocessing than its own answers a little worse and nobody notices.
"""

from __future__ import annotations

from camserve.server.models.config import ModelConfig

__all__ = ["with_published_preset"]

_TORCHVISION = "torchvision:"


def with_published_preset(config: ModelConfig) -> ModelConfig:
    """Fills labels and `[input]` of a pretrained torchvision classifier from its weights' own record; nothing is downloaded.

    What the card says itself stays. Other models come back as they are.
    """
    factory = config.factory
    if factory is None or not factory.pretrained or not factory.name.startswith(_TORCHVISION):
        return config
    import torchvision  # noqa: PLC0415 - it takes seconds to import, and servers of archives need none of it

    name = factory.name.removeprefix(_TORCHVISION)
    if name not in torchvision.models.list_models():
        return config  # The factory tells better what is wrong.
    weights = torchvision.models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    if not hasattr(preset, "crop_size"):
        return config  # Segmentation and detection presets resize in other ways.
    published = {
        "size": (preset.crop_size[0], preset.crop_size[0]),
        "resize": "crop",
        "resize_size": preset.resize_size[0],
        "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
    }
    given = config.input.model_fields_set
    if given & {"size", "resize", "resize_size"}:
        # The three belong together: half of theirs and half of ours would be neither.
        given = given | {"size", "resize", "resize_size"}
    kept = {field: value for field, value in published.items() if field not in given}
    labels = config.labels or tuple(weights.meta.get("categories", ()))
    return config.model_copy(update={"input": config.input.model_copy(update=kept), "labels": labels})
