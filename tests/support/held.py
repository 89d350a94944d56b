"""A `camserve serve` process whose model makes a forward only when the test lets it: events in place of clocks, across processes.

The model is the factory `support.held:make`; it finds the folder of its gate in the environment. Two named pipes tell the test
which forward has begun, and the model that it may go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
from collections.abc import Iterator
from pathlib import Path

from support.load import Served, served_folder
from support.nets import TinyNet
from support.processes import STEADY, ServerProcess
from torch import Tensor, nn

__all__ = ["Gate", "Held", "HeldNet", "held_process", "make"]

_GATE = "CAMSERVE_TEST_GATE"
_PATIENCE_SECONDS = 180.0


class Gate:
    """The test's side: closed, each forward of the model waits until it is let through."""

    def __init__(self, folder: Path) -> None:
        self._closed = folder / "closed"
        for name in ("begun", "let"):
            os.mkfifo(folder / name)
        # Open at both ends for good, so that neither side ever waits for the other to open.
        self._begun = os.open(folder / "begun", os.O_RDWR)
        self._let = os.open(folder / "let", os.O_RDWR)

    def close(self) -> None:
        """From now on forwards wait."""
        self._closed.touch()

    def open(self) -> None:
        """Lets the forwards that wait through, and all to come."""
        self._closed.unlink(missing_ok=True)
        self.let(1000)

    def let(self, forwards: int) -> None:
        """Lets some forwards through, also ones that have not begun."""
        os.write(self._let, bytes(forwards))

    def begun(self, forwards: int = 1) -> None:
        """Waits until the model has begun so many more forwards."""
        for _ in range(forwards):
            assert self._is_begun(_PATIENCE_SECONDS), "the model has not begun the forward that was waited for"
            os.read(self._begun, 1)

    def forget(self) -> None:
        """Takes back what was let through for nothing, and is not told of what began: the next test starts anew."""
        for pipe in (self._begun, self._let):
            while select.select([pipe], [], [], 0)[0]:
                os.read(pipe, 4096)

    def is_idle(self) -> bool:
        """Whether no forward has begun that `begun` was not told of."""
        return not self._is_begun(0)

    def end(self) -> None:
        """Lets go of the pipes."""
        os.close(self._begun)
        os.close(self._let)

    def _is_begun(self, seconds: float) -> bool:
        return bool(select.select([self._begun], [], [], seconds)[0])


class HeldNet(TinyNet):
    """Waits at the gate, while that is closed, before each forward."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b classes)."""
        folder = Path(os.environ[_GATE])
        if (folder / "closed").exists():
            for name, flag in (("begun", os.O_WRONLY), ("let", os.O_RDONLY)):
                pipe = os.open(folder / name, flag)
                os.write(pipe, b"x") if flag == os.O_WRONLY else os.read(pipe, 1)
                os.close(pipe)
        scores: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return scores


def make() -> nn.Module:
    """The factory."""
    return HeldNet()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A server and the gate of its model.

    Attributes:
        served: its ports, log and metrics.
        gate: open at first.
    """

    served: Served
    gate: Gate

    @property
    def process(self) -> ServerProcess:
        """Its process."""
        return self.served.process


@contextlib.contextmanager
def held_process(folder: Path, *, size: int = 32, max_batch: int = 8, **settings: object) -> Iterator[Held]:
    """`camserve serve` with the one model `held`; ends with the `with` block, its gate open.

    Args:
        folder: for repository, pipes and log.
        size: of the model's input, pixels.
        max_batch: rows of a pass.
        settings: by name, such as `max_requests=4`.
    """
    version = folder / "models" / "held" / "1"
    version.mkdir(parents=True)
    told = (
        f'default_layer = "body"\nmax_batch = {max_batch}\n[input]\nsize = [{size}, {size}]\n'
        '[factory]\nname = "support.held:make"\nallowed_imports = ["support.held"]\nrandom_seed = 0\n'
    )
    (version.parent / "model.toml").write_text(told, encoding="utf-8")
    gate = Gate(folder)
    environment = {**STEADY, _GATE: str(folder)}
    try:
        with served_folder(folder / "models", folder / "server.log", environment, **settings) as served:
            try:
                yield Held(served=served, gate=gate)
            finally:
                # Lest it wait for the gate in vain when it drains.
                gate.open()
    finally:
        gate.end()
