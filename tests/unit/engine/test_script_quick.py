import io

import pytest
import torch
import torchvision
from torch import Tensor, nn

from camserve.server.engine.script import ScriptProgram


class TwoOutputs(nn.Module):
    """A convolution with batch normalisation; returns a dict that holds a tuple, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(b 3 h w) to a map and scores."""
        images.mul_(2.0)
        maps = self.norm(self.conv(images)).relu()
        return {"out": (maps, self.head(maps.mean(dim=(2, 3))))}


def program_of(module: nn.Module, dtype: torch.dtype = torch.float32) -> ScriptProgram:
    """A scripted program."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)
    return ScriptProgram(torch.jit.script(module.eval()), device=torch.device("cpu"), dtype=dtype)


def images(rows: int, side: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise (rows 3 h w)."""
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 5e-2)]
)
def test_the_quick_forward_is_the_forward_to_rounding(dtype: torch.dtype, tolerance: float) -> None:
    """Folding and fusing move last bits only, at every batch size and input size, and the same bits come every time."""
    program = program_of(torchvision.models.resnet18(weights=None), dtype)

    for rows, side in [(1, 64), (3, 64), (2, 96)]:
        batch = images(rows, side, dtype)
        quick, expected = program.quick(batch).double(), program.run(batch).double()
        assert float((quick - expected).abs().max()) <= tolerance * float(expected.abs().max())
        assert torch.equal(program.quick(batch).double(), quick)


def test_structures_come_back_and_inputs_stay() -> None:
    """Nested outputs keep their shape, and what the archive writes into its input is not seen by the caller."""
    program = program_of(TwoOutputs())
    batch = images(2, 16)
    before = batch.clone()

    quick = program.quick(batch)

    assert torch.equal(before, batch)
    for ours, expected in zip(quick["out"], program.run(batch)["out"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_the_archive_itself_is_left_as_it_was() -> None:
    """Making the quick form changes neither the program's digests nor its own outputs."""
    program = program_of(torchvision.models.resnet18(weights=None))
    batch = images(2)
    digests, expected = program.digests(), program.run(batch)

    program.quick(batch)

    assert program.digests() == digests
    assert torch.equal(program.run(batch), expected)


def test_an_archive_frozen_before_it_was_saved_runs_too() -> None:
    """What torch cannot freeze again is run as it is, or rewritten; the result is the same to rounding."""
    module = torchvision.models.resnet18(weights=None).eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.freeze(torch.jit.script(module)), file)
    file.seek(0)
    program = ScriptProgram(torch.jit.load(file), device=torch.device("cpu"), dtype=torch.float32)
    batch = images(2)

    torch.testing.assert_close(program.quick(batch), program.run(batch), rtol=1e-5, atol=1e-5)
