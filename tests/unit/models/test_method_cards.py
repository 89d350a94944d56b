"""What a card says of methods, tried on real architectures right after loading."""

import pytest
import torch
from support.nets import TinyNet
from support.servers import script_source
from torch import Tensor, nn

from camserve.server.models.config import FactoryConfig, InputConfig, ModelConfig
from camserve.server.models.loader import load_model
from camserve.server.models.sources import ModelSource


class Gated(nn.Module):
    """SiLU in place of ReLU: not piecewise linear."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 8, 3)
            self.act = nn.SiLU()
            self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) to (b 4)."""
        return self.head(self.act(self.conv(images)).mean((2, 3)))


def cards(source: ModelSource) -> dict[str, tuple[bool, str]]:
    """Whether each method works, and the note."""
    card = load_model(source, device=torch.device("cpu"), max_batch_rows=2).card
    return {method.slug: (method.works, method.note) for method in card.methods}


def test_fullgrad_says_when_it_is_incomplete(tmp_path):
    """A net of linear layers and ReLUs is drawn to the last bit; SiLU keeps evidence of its own, and the card says how much."""
    assert (True, "") == cards(script_source("relu", TinyNet(), tmp_path))["fullgrad"]

    works, note = cards(script_source("silu", Gated(), tmp_path))["fullgrad"]
    assert works
    assert "incomplete" in note
    assert "SiLU" in note


def test_guided_backpropagation_needs_a_relu(tmp_path):
    """Without a single ReLU there is nothing to gate: the card says what was found, not the first request."""
    works, note = cards(script_source("silu", Gated(), tmp_path))["guided-backprop"]

    assert not works
    assert "vanilla-backprop" in note or "grad-cam" in note


@pytest.mark.timeout(120)
def test_shapley_cam_needs_a_second_derivative():
    """Fused attention has none; that is known before the first request."""
    factory = FactoryConfig(name="timm:vit_tiny_patch16_224", random_seed=0)
    config = ModelConfig(input=InputConfig(size=(224, 224)), factory=factory)

    works, note = cards(ModelSource(name="vit", version="1", path=None, config=config))["shapley-cam"]

    assert not works
    assert "second derivative" in note
    assert "grad-cam" in note
