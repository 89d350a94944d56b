"""The small convolutional classifier behind the demo model.

Arrives: normalised pictures (b 3 h w). Leaves: logits (b 5). `train.py` fits and scripts it; the server only ever sees the
scripted archive. The head is global average pooling and one linear layer, so that for `layer4` CAM, Grad-CAM and
HiResCAM agree up to a factor; the last two stages keep a stride of 8, so that a thin flaw still spans several cells.
Signatures say plain `Tensor` because TorchScript compiles them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["DEFAULT_LAYER", "MEAN", "STD", "SurfaceNet", "front", "tail"]

DEFAULT_LAYER = "layer4"
"""The stage whose maps are published."""

MEAN = (0.485, 0.485, 0.485)
"""Subtracted from each channel after scaling to 0..1."""

STD = (0.225, 0.225, 0.225)
"""Then divided by."""


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut; average pooling on the shortcut where the block strides."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(stride) if stride > 1 else nn.Identity(),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Takes (b c h w), gives non-negative features (b d i j), halved in height and width where the block strides."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        z: Tensor = self.relu2(y + self.shortcut(x))
        return z


class SurfaceNet(nn.Module):
    """Stem and four stages at strides 2, 2, 4, 8 and 8, then average pooling and a linear layer.

    Args:
        classes: how many logits.
        width: channels of the first stage; the others are multiples of it.
    """

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 5, 2, padding=2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.layer1 = Block(width, width)
        self.layer2 = Block(width, 2 * width, stride=2)
        self.layer3 = Block(2 * width, 4 * width, stride=2)
        self.layer4 = Block(4 * width, 6 * width, dilation=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Takes normalised pictures (b 3 h w), gives logits (b n)."""
        y = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        logits: Tensor = self.fc(torch.flatten(self.pool(y), 1))
        return logits


def front(model: nn.Module, inputs: Tensor) -> Tensor:
    """Runs a `SurfaceNet`, scripted or not, up to its last stage: (b 3 h w) in, (b c i j) out."""
    # Not get_submodule: scripted modules refuse it.
    children = dict(model.named_children())
    for name in ("stem", "layer1", "layer2", "layer3", "layer4"):
        inputs = children[name](inputs)
    return inputs


def tail(model: nn.Module, features: Tensor) -> Tensor:
    """Runs what follows the last stage: (b c i j) in, logits (b n) out."""
    children = dict(model.named_children())
    logits: Tensor = children["fc"](torch.flatten(children["pool"](features), 1))
    return logits
