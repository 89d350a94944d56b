"""Explanations that nobody asked for: the rules on a model's card, what they add to a request, and what became of them.

`reading.py` makes rules when a model is loaded, `applying.py` adds their specs to a request, `sampling.py` chooses requests, and
`standing.py` follows the answer. The engine knows nothing of them: it is told which specs are due.
"""

from __future__ import annotations

from camserve.server.rules.applying import apply_rules
from camserve.server.rules.reading import with_rules
from camserve.server.rules.sampling import is_sampled
from camserve.server.rules.standing import Standing

__all__ = ["Standing", "apply_rules", "is_sampled", "with_rules"]
