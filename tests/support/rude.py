"""Models that behave as foreign code may: they end the process, raise what nobody catches, or never come back from loading.

Served through the factories `support.rude:<name>`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading

from support.nets import TinyNet
from torch import Tensor, nn

from camserve.server.models.config import FactoryConfig, InputConfig, ModelConfig
from camserve.server.models.sources import ModelSource

RAISED = {
    "exit": SystemExit(5),
    "interrupt": KeyboardInterrupt(),
    "generator": GeneratorExit(),
    "cancelled": asyncio.CancelledError(),
    "stop": StopIteration(),
}
LOADING = threading.Event()


class RudeNet(TinyNet):
    """Raises what it was made with for bright inputs; behaves while it is loaded."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes), or not."""
        if bool((x.mean((1, 2, 3)) > 2).any()):
            raise RAISED[self.kind]
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def make(kind: str) -> nn.Module:
    """A net that is rude when asked something."""
    return RudeNet(kind)


def _maker(kind: str):
    return lambda: make(kind)


raises_exit = _maker("exit")
raises_interrupt = _maker("interrupt")
raises_generator = _maker("generator")
raises_cancelled = _maker("cancelled")


def load_exit() -> nn.Module:
    """Ends the process while it is built."""
    sys.exit(3)


def load_stop() -> nn.Module:
    """Raises what no Future can carry."""
    return next(iter([]))


def load_cancelled() -> nn.Module:
    """Raises what looks like our own cancellation."""
    raise asyncio.CancelledError


def load_for_ever() -> nn.Module:
    """Tells on standard error that it is loading, and never returns."""
    os.write(2, b"loading for ever\n")
    threading.Event().wait()
    raise AssertionError("unreachable")


def rude_source(name: str) -> ModelSource:
    """The model made by the factory of that name."""
    factory = FactoryConfig(name=f"support.rude:{name}", allowed_imports=("support.rude",), random_seed=0)
    config = ModelConfig(factory=factory, input=InputConfig(size=(32, 32)), default_layer="body")
    return ModelSource(name=name.replace("_", "-"), version="1", path=None, config=config)
