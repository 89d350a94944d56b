"""Methods that try things out on the model: mask the input or a layer, and watch the score."""

from __future__ import annotations

from camserve.server.cam.methods.method import Method

__all__ = ["PERTURBATION"]

PERTURBATION: tuple[Method, ...] = ()
