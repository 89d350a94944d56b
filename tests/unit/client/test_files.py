from __future__ import annotations

from pathlib import Path

import pytest

from camserve.client.files import find_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in two levels, some of whose names differ by suffix or case only, and a text."""
    for name in ("a.png", "a.jpg", "b.PNG", "deep/b.tiff", "deep/c.webp", "notes.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "in"


def _stems(*arguments: str, excluded: Path | None = None) -> list[str]:
    return [str(file.stem) for file in find_images(arguments, excluded=excluded)]


def test_folders_are_searched_and_their_structure_is_kept(folder: Path) -> None:
    """Suffixes stay only where two names would otherwise be one."""
    assert ["a.jpg", "a.png", "b", "deep/b", "deep/c"] == _stems(str(folder))


def test_globs_are_expanded_for_shells_that_do_not(folder: Path) -> None:
    """Also recursively."""
    assert ["a"] == _stems(f"{folder}/a.p*")
    assert ["b", "c"] == _stems(f"{folder}/**/*.tiff", f"{folder}/**/*.webp")


def test_files_of_one_name_from_several_folders_are_numbered(folder: Path) -> None:
    """No result overwrites another's."""
    (folder / "deep" / "a.png").write_bytes(b"x")

    assert ["a.png", "a.png-2"] == _stems(f"{folder}/a.png", f"{folder}/deep/a.png")


def test_an_image_named_twice_is_explained_once(folder: Path) -> None:
    """A glob and a folder may overlap."""
    assert ["a"] == _stems(f"{folder}/a.png", f"{folder}/a.png")


def test_results_of_an_earlier_run_are_no_inputs(folder: Path) -> None:
    """The output folder may lie in the input folder."""
    assert ["a.jpg", "a.png", "b"] == _stems(str(folder), excluded=folder / "deep")


def test_stdin_and_missing_files_are_taken_as_they_are(folder: Path) -> None:
    """A missing file is told when it is its turn, so that the others are done."""
    assert ["stdin", "gone"] == _stems("-", f"{folder}/gone.png")
