from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from camserve.server.engine.factories import load_factory
from camserve.server.errors import CamserveError, InvalidRequest, NotFound, Reason, Unsupported

CPU = torch.device("cpu")


def build_net(classes: int = 3) -> nn.Module:
    """A factory of the operator's own, found by its import path."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


def build_number() -> int:
    """A factory that returns something else."""
    return 1


@pytest.fixture
def path_of_this_module(monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes this file importable by a name, and returns that name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return "test_factories"


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:test_resnet"])
def test_random_weights_come_from_their_seed(name: str) -> None:
    """The same seed gives the same weights, another one gives others."""
    first, again, other = (load_factory(name, random_seed=seed, device=CPU).digests() for seed in (1, 1, 2))

    assert first == again
    assert first.weights != other.weights
    assert first.code == other.code


def test_the_global_random_state_is_left_alone() -> None:
    """Building a model neither reads from nor writes to the process's own random numbers."""
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)

    load_factory("torchvision:squeezenet1_1", random_seed=0, device=CPU)

    assert torch.equal(expected, torch.rand(4))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_read_from_a_file(tmp_path: Path, path_of_this_module: str, suffix: str) -> None:
    """The loaded model computes what the saved one did, from either kind of file."""
    net = build_net().eval()
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": net.state_dict(), "epoch": 3}, file)
    else:
        safetensors.torch.save_file(net.state_dict(), file)
    images = torch.randn(2, 3, 8, 8)

    program = load_factory(
        f"{path_of_this_module}:build_net", weights=file, allowed_imports=[path_of_this_module], device=CPU
    )

    with torch.no_grad():
        assert torch.equal(net(images), program.run(images))


def test_options_reach_the_factory(path_of_this_module: str) -> None:
    """A model for five classes is asked for as its factory would be in Python."""
    name = f"{path_of_this_module}:build_net"

    program = load_factory(name, random_seed=0, allowed_imports=[name], device=CPU, options={"classes": 5})

    assert (5,) == program.tensors()["3.bias"].shape


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        pytest.param({}, "no source of weights", id="none"),
        pytest.param({"random_seed": 0, "pretrained": True}, "random_seed and pretrained", id="two"),
        pytest.param({"random_seed": 0, "weights": Path("w.pt")}, "weights and random_seed", id="file and seed"),
    ],
)
def test_exactly_one_source_of_weights_must_be_named(sources: dict[str, object], said: str) -> None:
    """Nothing is defaulted: a model with random weights explains as confidently as a trained one."""
    with pytest.raises(InvalidRequest, match=said):
        load_factory("torchvision:resnet18", device=CPU, **sources)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        pytest.param("torchvision:resnet81", NotFound, "resnet18", id="torchvision, near name"),
        pytest.param("timm:test_resnett", NotFound, "test_resnet", id="timm, near name"),
        pytest.param("resnet18", InvalidRequest, "torchvision:resnet50", id="no library"),
        pytest.param("os:getcwd", Unsupported, "not allowed; allowed: nothing_here", id="not allowed"),
        pytest.param("nothing_here:build", NotFound, "cannot import", id="no such module"),
    ],
)
def test_an_unknown_name_is_refused_with_what_would_do(name: str, error: type[CamserveError], said: str) -> None:
    """The message helps with the next attempt."""
    with pytest.raises(error, match=said):
        load_factory(name, random_seed=0, allowed_imports=["nothing_here"], device=CPU)


def test_a_factory_that_returns_no_module_is_refused(path_of_this_module: str) -> None:
    """What is not an nn.Module cannot be a program."""
    name = f"{path_of_this_module}:build_number"

    with pytest.raises(InvalidRequest, match="returned a int"):
        load_factory(name, random_seed=0, allowed_imports=[name], device=CPU)


def test_weights_of_another_model_are_refused(tmp_path: Path, path_of_this_module: str) -> None:
    """Nothing is loaded in part; the message names the tensors that do not fit."""
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(build_net(5).state_dict(), file)
    name = f"{path_of_this_module}:build_net"

    with pytest.raises(InvalidRequest, match=r"3\.weight"):
        load_factory(name, weights=file, allowed_imports=[name], device=CPU)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """A pickled module is not a state dict, and is not unpickled."""
    file = tmp_path / "weights.pt"
    torch.save(build_net(), file)

    with pytest.raises(InvalidRequest, match="cannot read weights"):
        load_factory("torchvision:resnet18", weights=file, device=CPU)


class Strange:
    """What a pickle can do: call anything when it is read."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        """As pickle wants it."""
        return Path.touch, (self._trace,)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("is_archive", [True, False])
def test_weights_run_no_code(
    tmp_path: Path,
    suffix: str,
    is_archive: bool,  # noqa: FBT001 - a test parameter
) -> None:
    """Beside tensors, in either format of PyTorch, and whatever the file is called."""
    file = tmp_path / f"weights{suffix}"
    state = {**build_net().state_dict(), "extra": Strange(tmp_path / "trace")}
    torch.save(state, file, _use_new_zipfile_serialization=is_archive)

    with pytest.raises(InvalidRequest, match="cannot read weights"):
        load_factory("torchvision:squeezenet1_1", weights=file, device=CPU)
    assert not (tmp_path / "trace").exists()


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    """The path is told."""
    with pytest.raises(NotFound, match="there is no file") as refused:
        load_factory("torchvision:squeezenet1_1", weights=tmp_path / "w.pt", device=CPU)

    assert Reason.MODEL_NOT_FOUND == refused.value.reason
