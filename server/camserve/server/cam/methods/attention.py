"""Methods that read a transformer's attention."""

from __future__ import annotations

from camserve.server.cam.methods.method import Method

__all__ = ["ATTENTION"]

ATTENTION: tuple[Method, ...] = ()
