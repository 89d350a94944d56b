"""An archive is loaded far from where it was made: without its classes, and with operators that nobody has registered yet."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torchvision
from torch import Tensor, nn


@torch.jit.script
class Doubler:
    """A script class, as torchvision's detectors hold them: an attribute that is no module."""

    def __init__(self) -> None:
        self.factor = 2

    def apply(self, value: Tensor) -> Tensor:
        """Doubles."""
        return value * self.factor


class Detector(nn.Module):
    """A convolution, an object of a script class and torchvision's non-maximum suppression."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.doubler = Doubler()

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b 4)."""
        scores = self.doubler.apply(self.body(x)).mean((2, 3))
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]], device=x.device)
        kept = torchvision.ops.nms(boxes, scores[0, :2], 0.5)
        return scores + 0 * kept.sum()


LOAD = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from camserve.server.engine.program import TapName
from camserve.server.engine.script import load_script
assert "torchvision" not in sys.modules
program = load_script(Path(sys.argv[1]), device=torch.device("cpu"))
capture = program.capture([TapName("body")], torch.ones(1, 3, 8, 8))
(gradient,) = torch.autograd.grad(capture.outputs.sum(), list(capture.activations.values()))
print(tuple(gradient.shape), sorted(program.tensors()))
"""


@pytest.mark.filterwarnings("ignore")
def test_archive_with_foreign_operators_and_classes(tmp_path):
    """A process that never imported torchvision, nor the script class, loads the archive and taps it."""
    path = tmp_path / "detector.pt"
    torch.jit.save(torch.jit.script(Detector().eval()), str(path))

    done = subprocess.run(  # noqa: S603 - our own text
        [sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, timeout=120, check=False
    )

    assert "(1, 4, 8, 8) ['body.bias', 'body.weight']\n" == done.stdout, done.stderr


class Pooled(nn.Module):
    """A convolution and torchvision's RoI alignment."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b 4)."""
        return self.body(x).mean((2, 3)) + 0 * torchvision.ops.roi_align(x, torch.zeros(1, 5), 2).sum()


@pytest.mark.filterwarnings("ignore")
def test_export_with_foreign_operators(tmp_path):
    """The same for an exported program."""
    path = tmp_path / "pooled.pt2"
    torch.export.save(torch.export.export(Pooled().eval(), (torch.ones(1, 3, 8, 8),)), path)

    done = subprocess.run(  # noqa: S603 - our own text
        [sys.executable, "-c", LOAD.replace("script", "export"), str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert "(1, 4, 8, 8) ['body.bias', 'body.weight']\n" == done.stdout, done.stderr
