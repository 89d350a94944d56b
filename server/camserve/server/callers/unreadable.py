"""What a person is told of a file that cannot be read or written. `reloaded.py` and `command.py` ask."""

from __future__ import annotations

__all__ = ["unreadable"]


def unreadable(error: OSError) -> str:
    """Which file it is, and why; people know no numbers of errors."""
    return f"{error.filename}: {error.strerror}" if error.filename is not None and error.strerror else str(error)
