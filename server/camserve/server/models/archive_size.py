"""How large a model file is, also when it is unpacked: told by its table of contents, before any of it is read.

`loader.py` asks for each file. A zip archive of a few megabytes can unpack to more than any memory.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

__all__ = ["check_size", "unpacked_bytes"]


def check_size(path: Path, most_bytes: int) -> None:
    """Refuses a file that is too large, packed or unpacked.

    Raises:
        ValueError: it is; the text tells the sizes and the setting.
    """
    packed = path.stat().st_size
    unpacked = max(packed, unpacked_bytes(path))
    if unpacked > most_bytes:
        grown = f", {packed:,} bytes that unpack to {unpacked:,}," if unpacked > packed else f", {packed:,} bytes,"
        raise ValueError(
            f"{path.name}{grown} is larger than max_archive_bytes, {most_bytes:,}; raise that setting if the file is what it "
            "should be"
        )


def unpacked_bytes(path: Path) -> int:
    """Sum of the sizes that a zip archive declares for its entries; 0 for a file that is none.

    PyTorch reads no more of an entry than is declared. Both readers are asked: a file can be made so that they see other entries.
    """
    return max(_by_python(path), _by_torch(path))


def _by_python(path: Path) -> int:
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile:
        return 0


def _by_torch(path: Path) -> int:
    try:
        reader = torch._C.PyTorchFileReader(str(path))  # noqa: SLF001 - how torch reads archives
        return sum(reader.get_record_size(entry) for entry in reader.get_all_records())
    except RuntimeError:
        return 0  # Not of PyTorch, which whoever loads it tells better.
