"""`camserve models export`: archives of torchvision's and of our own factories, checked against them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from click.testing import CliRunner, Result
from support.nets import TinyNet
from torch import Tensor, nn

from camserve.server.engine.export import load_export
from camserve.server.engine.script import load_script
from camserve.server.entries.export_command import export

CPU = torch.device("cpu")


class Wordy(TinyNet):
    """Cannot be scripted, since its forward takes any keyword, but traced."""

    def forward(self, x: Tensor, **_words: object) -> Tensor:
        """(b 3 h w) to (b classes)."""
        return super().forward(x)


class Fickle(TinyNet):
    """Cannot be scripted, and what is traced of it is only right for as many rows as it was traced with."""

    def forward(self, x: Tensor, **_words: object) -> Tensor:
        """(b 3 h w) to (b classes), more of it the more rows there are."""
        return super().forward(x) * float(np.sqrt(len(x)))


def build_tiny(classes: int = 4) -> nn.Module:
    """A factory with an argument."""
    return TinyNet(classes)


def build_wordy() -> nn.Module:
    """Another factory."""
    return Wordy()


def build_fickle() -> nn.Module:
    """One whose model cannot be archived."""
    return Fickle()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """This module under a name that can be imported, whichever way pytest imported it."""
    (tmp_path / "plant_nets.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "plant_nets"


def run(*arguments: str | Path) -> Result:
    """Runs the command."""
    return CliRunner().invoke(export, [*map(str, arguments)])


@pytest.mark.parametrize(("archive_format", "file"), [("torchscript", "model.pt"), ("pt2", "model.pt2")])
def test_an_archive_answers_as_the_factory(tmp_path: Path, archive_format: str, file: str) -> None:
    """With the same weights, for any number of rows, and it is ready to be served."""
    root = tmp_path / "models"

    result = run(
        "torchvision:squeezenet1_1",
        "--models",
        root,
        "--random-weights",
        "7",
        "--size",
        "64",
        "--format",
        archive_format,
    )

    assert 0 == result.exit_code, result.output
    how = {"torchscript": "Scripted", "pt2": "Exported"}[archive_format]
    assert f"{how}; answers as the factory's model bit for bit.\n" in result.stderr
    path = root / "squeezenet1_1/1" / file
    program = load_script(path, device=CPU) if archive_format == "torchscript" else load_export(path, device=CPU)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = torchvision.models.squeezenet1_1().eval()
    batch = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(batch), program.run(batch))
    card = (root / "squeezenet1_1/model.toml").read_text(encoding="utf-8")
    assert "# Exported from torchvision:squeezenet1_1, random weights, seed 7.\n" in card
    assert [64, 64] == tomllib.loads(card)["input"]["size"]


def test_a_factory_of_ones_own_with_weights_from_a_file(tmp_path: Path, here: str) -> None:
    """Arguments reach it; the weights are those of the file; labels go to the card."""
    model = TinyNet(6, seed=3)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "net.safetensors")
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\ne\nf\n", encoding="utf-8")

    result = run(
        f"{here}:build_tiny", "--allow-import", here, "--option", "classes=6", "--weights", tmp_path / "net.safetensors",
        "--models", tmp_path / "models", "--name", "part", "--size", "32", "--labels", tmp_path / "labels.txt",
    )  # fmt: skip

    assert 0 == result.exit_code, result.output
    assert "torchscript, 6 classes" in result.stdout
    state = torch.jit.load(str(tmp_path / "models/part/1/model.pt")).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_scripted_is_traced_and_that_is_said(tmp_path: Path, here: str) -> None:
    """With the compiler's reason; control flow that depends on the input would be lost."""
    result = run(
        f"{here}:build_wordy", "--allow-import", f"{here}:build_wordy", "--random-weights", "0", "--size", "32",
        "--models", tmp_path / "models",
    )  # fmt: skip

    assert 0 == result.exit_code, result.output
    assert "It cannot be scripted: " in result.stderr
    assert "; traced; answers as the factory's model bit for bit.\n" in result.stderr
    assert (tmp_path / "models/build_wordy/1/model.pt").is_file()


def test_an_archive_that_answers_otherwise_is_not_written(tmp_path: Path, here: str) -> None:
    """Both ways are told with their reasons, and what else could be tried; nothing is left behind."""
    result = run(
        f"{here}:build_fickle", "--allow-import", here, "--random-weights", "0", "--size", "32",
        "--models", tmp_path / "models",
    )  # fmt: skip

    assert 1 == result.exit_code
    assert "it cannot be scripted: " in result.stderr
    assert "it cannot be traced: its archive answers otherwise than the model, by " in result.stderr
    assert "try --format pt2" in result.stderr
    assert not list((tmp_path / "models").iterdir())


def test_a_published_models_card_comes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels and preprocessing of pretrained weights are theirs; here the weights themselves come from a local cache."""
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    cache = tmp_path / "hub/checkpoints"
    cache.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), cache / Path(weights.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    result = run("torchvision:squeezenet1_1", "--models", tmp_path / "models", "--size", "64")

    assert 0 == result.exit_code, result.output
    folder = tmp_path / "models/squeezenet1_1"
    card = tomllib.loads((folder / "model.toml").read_text(encoding="utf-8"))
    assert ([64, 64], [0.485, 0.456, 0.406]) == tuple(card["input"][key] for key in ("size", "mean"))
    assert list(weights.meta["categories"]) == (folder / "labels.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("torchvision:resnet81",), "torchvision has no model 'resnet81'; near names: resnet"),
        (("resnet18",), "'resnet18' is not a factory; write 'torchvision:resnet50'"),
        (("os:getcwd", "--name", "x"), "importing 'os:getcwd' is not allowed; allowed: nothing"),
        (("torchvision:resnet18", "--name", "my part"), "'my part' is not a model name"),
    ],
)
def test_what_cannot_be_built_is_told(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    """Before anything is written."""
    result = run(*arguments, "--models", tmp_path / "models", "--random-weights", "0")

    assert 1 == result.exit_code
    assert told in result.stderr
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--option", "classes"), "'classes' is not KEY=VALUE"),
        (("--random-weights", "0", "--weights", "{file}"), "contradict each other"),
    ],
)
def test_wrong_usage_is_told(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    """Exit status 2 is click's for usage."""
    file = tmp_path / "w.pt"
    file.touch()

    result = run("torchvision:resnet18", "--models", tmp_path / "models", *(a.format(file=file) for a in arguments))

    assert 2 == result.exit_code
    assert told in result.stderr


def test_help_shows_examples() -> None:
    """Nobody should have to guess the first call."""
    assert "Examples:\n    camserve models export" in run("--help").output
