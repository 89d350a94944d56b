"""`camserve models add` on real archives and folders."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from support.nets import TinyNet

from camserve.client import Client
from camserve.server.entries.add_command import add
from camserve.server.entries.placing import find_place, staged
from camserve.server.models.sources import scan_repository


def run(*arguments: str | Path) -> Result:
    """Runs the command."""
    return CliRunner().invoke(add, [*map(str, arguments)])


def files(root: Path) -> list[str]:
    """Every file and folder below, hidden ones as well."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """TinyNet as a bare archive."""
    path = tmp_path / "tiny.pt"
    torch.jit.save(torch.jit.script(TinyNet().eval()), str(path))
    return path


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Labels for its four classes; one needs no escaping only where files are UTF-8."""
    path = tmp_path / "labels.txt"
    path.write_text("good\nKratzer, groß\nspot\ncrack\n", encoding="utf-8")
    return path


def test_what_was_added_is_served_as_described(archive: Path, labels: Path, tmp_path: Path, serve: Any) -> None:
    """The card says on the wire what the flags said; the archive has the same bytes."""
    root = tmp_path / "models"

    result = run(
        archive, "--models", root, "--name", "part", "--size", "32x48", "--labels", labels, "--mean", "0.5,0.4,0.3",
        "--std", "0.25,0.5,1", "--resize", "crop", "--resize-size", "64",
    )  # fmt: skip

    assert 0 == result.exit_code, result.output
    assert ["part", "part/1", "part/1/model.pt", "part/labels.txt", "part/model.toml"] == files(root)
    assert archive.read_bytes() == (root / "part/1/model.pt").read_bytes()
    server = serve(*scan_repository(root))
    with Client(server.target) as client:
        card = client.model("part")
    assert ("good", "Kratzer, groß", "spot", "crack") == card.labels
    assert ((3, 32, 48), "crop", "rgb") == (card.input.shape, card.input.resize, card.input.channels)
    assert (pytest.approx((0.5, 0.4, 0.3)), pytest.approx((0.25, 0.5, 1))) == (card.input.mean, card.input.std)


def test_the_card_tells_also_what_was_not_said(archive: Path, tmp_path: Path) -> None:
    """Defaults that decide what the model sees are written out; the layer that was chosen stands in a comment."""
    result = run(archive, "--models", tmp_path / "models", "--size", "32")

    assert 0 == result.exit_code, result.output
    text = (tmp_path / "models/tiny/model.toml").read_text(encoding="utf-8")
    card = tomllib.loads(text)
    assert ([32, 32], "rgb", "stretch", "bilinear") == tuple(
        card["input"][key] for key in ("size", "channels", "resize", "interpolation")
    )
    assert [0.485, 0.456, 0.406] == card["input"]["mean"]
    assert '# Added from "tiny.pt".\n' in text
    assert '# default_layer = "body"  # chosen at load' in text


def test_what_to_do_next_is_told(archive: Path, tmp_path: Path) -> None:
    """Where it is, what it can do, and the two commands that follow."""
    root = tmp_path / "models"

    told = run(archive, "--models", root, "--size", "32").stdout

    assert f"Added tiny, version 1: {root}/tiny/1\n" in told
    assert "torchscript, 4 classes" in told
    assert f"  read {root}/tiny/model.toml: is [input] what the model was trained with?\n" in told
    assert f"  camserve models check {root} --name tiny\n  camserve serve --models {root} " in told


def test_another_archive_is_the_next_version(archive: Path, tmp_path: Path) -> None:
    """The card stays as it is, whoever wrote it; versions count as numbers."""
    root = tmp_path / "models"
    (root / "tiny/9").mkdir(parents=True)
    (root / "tiny/model.toml").write_text("[input]\nsize = [32, 32]\n", encoding="utf-8")

    result = run(archive, "--models", root)

    assert 0 == result.exit_code, result.output
    assert ["tiny", "tiny/10", "tiny/10/model.pt", "tiny/9", "tiny/model.toml"] == files(root)
    assert "[input]\nsize = [32, 32]\n" == (root / "tiny/model.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("policy", "is_told"), [('policy = "all"', False), ('policy = "listed"\nlisted = [1]', True)])
def test_a_version_that_the_policy_leaves_out_is_told(
    archive: Path,
    tmp_path: Path,
    policy: str,
    is_told: bool,  # noqa: FBT001 - a parameter.
) -> None:
    """Where model.toml lists the versions that serve, the new one has to be added there."""
    root = tmp_path / "models"
    run(archive, "--models", root, "--size", "32")
    with (root / "tiny/model.toml").open("a", encoding="utf-8") as card:
        card.write(f"\n[versions]\n{policy}\n")

    told = run(archive, "--models", root).stdout

    assert "Added tiny, version 2" in told
    assert is_told == (f"It does not serve yet: [versions] in {root}/tiny/model.toml selects 1; " in told)


def test_servers_of_other_users_can_read_it(archive: Path, tmp_path: Path) -> None:
    """Folders and files are made with the rights of any other, not with those of temporary ones."""
    run(archive, "--models", tmp_path / "models", "--size", "32")
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()

    assert stat.S_IMODE(ordinary.stat().st_mode) == stat.S_IMODE((tmp_path / "models/tiny/1").stat().st_mode)
    assert stat.S_IMODE(archive.stat().st_mode) == stat.S_IMODE((tmp_path / "models/tiny/1/model.pt").stat().st_mode)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--size", "31"), None),
        (("--labels", "{two}"), "has 4 classes, but its card has 2 labels"),
        (("--default-layer", "head.relu"), "default_layer 'head.relu' gives no map in model 'tiny'; layers: "),
        (("--mean", "0.5,0.5"), "mean (0.5, 0.5) must be one finite number, or 3"),
        (("--resize-size", "64"), "resize_size belongs to resize 'crop'"),
        (("--name", "../tiny"), "'../tiny' is not a model name"),
        (("--version", "1/2"), "'1/2' is not a version name"),
        (("--device", "gpu"), "'gpu' is not a device"),
    ],
)
def test_what_cannot_be_served_leaves_nothing_behind(
    archive: Path, tmp_path: Path, arguments: tuple[str, ...], told: str | None
) -> None:
    """One complaint that tells what is wrong, and no folder of the model, hidden or not."""
    (tmp_path / "two.txt").write_text("good\nbad\n", encoding="utf-8")
    root = tmp_path / "models"

    result = run(archive, "--models", root, *(text.format(two=tmp_path / "two.txt") for text in arguments))

    if told is None:  # To see that the others fail for their own reasons.
        assert 0 == result.exit_code, result.output
        return
    assert 1 == result.exit_code
    assert told in result.stderr
    assert [] == (files(root) if root.exists() else [])


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    """Its ending or its content; weights alone have another way in, which is told."""
    for name, told in (("net.onnx", "has the ending '.onnx'"), ("net.pt", "this is not a TorchScript archive")):
        path = tmp_path / name
        path.write_bytes(b"nothing")
        result = run(path, "--models", tmp_path / "models")

        assert 1 == result.exit_code
        assert told in result.stderr
    assert not list((tmp_path / "models").glob("*"))


def test_nothing_is_overwritten(archive: Path, tmp_path: Path) -> None:
    """Not a version, not a card."""
    root = tmp_path / "models"
    run(archive, "--models", root, "--size", "32")
    before = {name: (root / name).stat().st_mtime_ns for name in files(root)}

    same, described = (run(archive, "--models", root, *more) for more in (("--version", "1"), ("--size", "64")))

    assert f"{root}/tiny/1 exists, and nothing is overwritten; leave --version out for 2" in same.stderr
    assert f"how it is served is said by {root}/tiny/model.toml: edit that" in described.stderr
    assert (1, 1) == (same.exit_code, described.exit_code)
    assert before == {name: (root / name).stat().st_mtime_ns for name in files(root)}


@pytest.mark.parametrize("is_new", [True, False])
def test_two_at_a_time_do_not_overwrite_each_other(tmp_path: Path, is_new: bool) -> None:  # noqa: FBT001 - a parameter.
    """Who comes second to the same place is told to come again, and what the first put there stays."""
    root = tmp_path / "models"
    if not is_new:
        (root / "part").mkdir(parents=True)
    place = find_place(root, "part")

    def put_both() -> None:
        with staged(place) as mine:
            (mine.version / "model.pt").write_text("mine", encoding="utf-8")
            with staged(place) as other:
                (other.version / "model.pt").write_text("other", encoding="utf-8")

    with pytest.raises(ValueError, match=r"was made by somebody else meanwhile.*run this again"):
        put_both()
    assert "other" == (root / "part/1/model.pt").read_text(encoding="utf-8")
    assert ["part", "part/1", "part/1/model.pt"] == files(root)


def test_nobody_sees_half_an_entry(tmp_path: Path) -> None:
    """While it is filled, a scan of the repository finds what was there before."""
    root = tmp_path / "models"
    (root / "part/1").mkdir(parents=True)
    (root / "part/1/model.pt").touch()

    for place in (find_place(root, "part"), find_place(root, "board")):
        before = list(scan_repository(root))
        with staged(place) as staging:
            (staging.version / "model.pt").touch()
            assert before == list(scan_repository(root))

    assert [("board", "1"), ("part", "2")] == [(source.name, source.version) for source in scan_repository(root)]


def test_a_repository_without_a_parent_is_a_mistyped_one(archive: Path, tmp_path: Path) -> None:
    """The last folder of the path is made, not the whole way there; a file is no folder."""
    far = run(archive, "--models", tmp_path / "srv" / "modles")

    assert f"there is no folder {tmp_path / 'srv'} in which a repository modles could be made" in far.stderr
    assert 2 == run(archive, "--models", archive).exit_code
    assert ["tiny.pt"] == files(tmp_path)


@pytest.mark.parametrize(
    ("flag", "text"), [("--size", "0"), ("--size", "1x2x3"), ("--mean", "a,b"), ("--shape", "2.5")]
)
def test_wrong_usage_is_told(archive: Path, tmp_path: Path, flag: str, text: str) -> None:
    """Exit status 2 is click's for usage; the flag is named."""
    result = run(archive, "--models", tmp_path / "models", flag, text)

    assert 2 == result.exit_code
    assert flag in result.stderr


def test_help_shows_examples() -> None:
    """Nobody should have to guess the first call."""
    assert "Examples:\n    camserve models add" in run("--help").output
