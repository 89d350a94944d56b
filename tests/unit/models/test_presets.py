"""What is known of published weights is used, and what the card says wins."""

from __future__ import annotations

from camserve.server.models.config import FactoryConfig, InputConfig, ModelConfig
from camserve.server.models.presets import with_published_preset

PRETRAINED = FactoryConfig(name="torchvision:resnet50", pretrained=True)


def test_labels_and_preprocessing_come_from_the_weights():
    """ResNet-50's published weights were measured at 232 pixels cropped to 224, on 1000 named classes."""
    config = with_published_preset(ModelConfig(factory=PRETRAINED))

    assert ("crop", 232, (224, 224)) == (config.input.resize, config.input.resize_size, config.input.size)
    assert (1000, "tench") == (len(config.labels), config.labels[0])
    assert (3, 224, 224) == config.recipe().shape


def test_the_card_wins():
    """A card that names a size and labels keeps them; mean and standard deviation still come from the weights."""
    given = ModelConfig(factory=PRETRAINED, labels=("a", "b"), input=InputConfig(size=(64, 64)))

    config = with_published_preset(given)

    assert ("stretch", None, (64, 64)) == (config.input.resize, config.input.resize_size, config.input.size)
    assert ("a", "b") == config.labels
    assert (0.485, 0.456, 0.406) == config.input.mean


def test_other_models_are_left_alone():
    """Archives, random weights, unknown names and detectors have no classification preset."""
    configs = [
        ModelConfig(),
        ModelConfig(factory=FactoryConfig(name="torchvision:resnet50", random_seed=0)),
        ModelConfig(factory=FactoryConfig(name="torchvision:resnet5", pretrained=True)),
        ModelConfig(factory=FactoryConfig(name="torchvision:ssdlite320_mobilenet_v3_large", pretrained=True)),
        ModelConfig(factory=FactoryConfig(name="timm:resnet50", pretrained=True)),
    ]

    assert configs == [with_published_preset(config) for config in configs]
