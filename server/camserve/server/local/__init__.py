"""Explanations without a server: `with LocalExplainer.load("part.pt") as explainer: explainer.explain("part.jpg", ["grad-cam"])`.

The same stages as a request to a server, one after another in the caller's thread: no socket, no event loop, no thread of ours.
What leaves are the client's own results, with the same bytes and digests that a server sends.
"""

from __future__ import annotations

from camserve.server.local.explainer import LocalExplainer

__all__ = ["LocalExplainer"]
