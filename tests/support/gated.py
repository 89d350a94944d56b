"""A model whose backward waits: it shows what the server sends before a gradient, and so before a map, can exist.

Served through the factory `support.gated:make`; the server runs in the test's process, so both see the same `Gate`.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from support.nets import TinyNet
from torch import Tensor, nn

from camserve.server.models.config import FactoryConfig, InputConfig, ModelConfig
from camserve.server.models.sources import ModelSource


class Gate:
    """Opened by the test; the backward waits for it."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.rows_backward = 0

    def reset(self) -> None:
        """Closes the gate again."""
        self.opened.clear()
        self.reached.clear()
        self.rows_backward = 0


GATE = Gate()


class _WaitInBackward(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        GATE.reached.set()
        if not GATE.opened.wait(timeout=180):
            raise RuntimeError("nobody opened the gate")
        GATE.rows_backward += len(gradient)
        return gradient


class GatedNet(TinyNet):
    """TinyNet with the gate between the last convolution and the head."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        features = self.body(self.stem(x))
        return self.head(_WaitInBackward.apply(features).mean((2, 3)))


def make() -> nn.Module:
    """The factory."""
    return GatedNet()


def gated_source() -> ModelSource:
    """The model `gated`; open the gate while it loads."""
    factory = FactoryConfig(name="support.gated:make", allowed_imports=("support.gated",), random_seed=0)
    config = ModelConfig(factory=factory, input=InputConfig(size=(32, 32)), default_layer="body")
    return ModelSource(name="gated", version="1", path=None, config=config)
