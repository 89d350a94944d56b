"""Methods whose map lies on the model's input itself: gradients with respect to pixels, and what is made of them."""

from __future__ import annotations

from camserve.server.cam.methods.method import Method

__all__ = ["INPUT_SPACE"]

INPUT_SPACE: tuple[Method, ...] = ()
