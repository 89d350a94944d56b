from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.nets import TinyNet
from support.servers import script_source, settings

from camserve.server.background import BackgroundServer
from camserve.server.models.archive_size import check_size, unpacked_bytes

BOMB = 64 << 20


def bombed(archive: Path) -> None:
    """Adds an entry of zeros, which packs to a thousandth."""
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as whole:
        root = whole.namelist()[0].partition("/")[0]
        whole.writestr(f"{root}/data/zeros", bytes(BOMB))


def test_archives_are_measured_unpacked(tmp_path: Path) -> None:
    """The entries of a zip file; what is no zip file is as large as it is."""
    archive, weights = tmp_path / "net.pt", tmp_path / "weights.safetensors"
    torch.jit.save(torch.jit.script(TinyNet()), str(archive))
    safetensors.torch.save_file(TinyNet().state_dict(), weights)
    ordinary = unpacked_bytes(archive)
    bombed(archive)

    assert 0 < ordinary <= 100_000
    assert BOMB + ordinary <= unpacked_bytes(archive)
    assert archive.stat().st_size < 1 << 20
    assert 0 == unpacked_bytes(weights)


def test_a_file_above_the_limit_is_refused_with_its_sizes(tmp_path: Path) -> None:
    """Packed or unpacked, the text tells how large it is, how large it may be, and the setting."""
    archive = tmp_path / "net.pt"
    torch.jit.save(torch.jit.script(TinyNet()), str(archive))
    size = archive.stat().st_size

    check_size(archive, 1 << 20)
    with pytest.raises(ValueError, match=rf"net\.pt, {size:,} bytes, is larger than max_archive_bytes, 1,024; raise"):
        check_size(archive, 1 << 10)
    bombed(archive)
    with pytest.raises(
        ValueError, match=r"bytes that unpack to 67,[0-9,]+, is larger than max_archive_bytes, 1,048,576"
    ):
        check_size(archive, 1 << 20)


def test_a_server_does_not_load_a_bomb(tmp_path: Path, serve: Any) -> None:
    """The setting reaches the loader; the same archive is served where it may be as large."""
    source = script_source("tiny", TinyNet(), tmp_path)
    assert source.path is not None
    bombed(source.path)

    with (
        pytest.raises(ValueError, match=r"model tiny could not be loaded: .* larger than max_archive_bytes"),
        BackgroundServer(settings(max_archive_bytes=1 << 20), [source]),
    ):
        pass
    assert "tiny" == serve(source).app.repository.get("tiny").card.name
