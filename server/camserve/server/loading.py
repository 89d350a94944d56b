"""A source and the settings to a model that answers: what `models/loader.py` loads, with the rules of its `model.toml`.

Called by `app.py` in the lifecycle's thread, by `entries/` and by `local/` in the caller's own.
"""

from __future__ import annotations

import torch

from camserve.server.engine.turns import InTurn, at_once
from camserve.server.models.loader import load_model
from camserve.server.models.repository import ServedModel
from camserve.server.models.sources import ModelSource
from camserve.server.rules import with_rules
from camserve.server.settings import Settings
from camserve.server.validate import RequestLimits

__all__ = ["load_served", "request_limits"]


def load_served(
    source: ModelSource, settings: Settings, device: torch.device, in_turn: InTurn = at_once
) -> ServedModel:
    """Loads one version of one model as a server does.

    Args:
        source: where it is and what its card says.
        settings: limits and pace.
        device: where it will run.
        in_turn: where the passes of the warm-up run.

    Raises:
        ValueError: the file, the card and the model do not fit together, or a rule does not fit the model; the text says how.
        CamserveError: the program does not run, or nothing in it can be explained.
    """
    served = load_model(
        source,
        device=device,
        max_batch_rows=settings.max_batch_rows,
        max_maps=settings.max_maps,
        slice_seconds=settings.slice_seconds,
        most_threads=settings.torch_threads,
        max_archive_bytes=settings.max_archive_bytes,
        in_turn=in_turn,
    )
    return with_rules(served, source.config, request_limits(settings))


def request_limits(settings: Settings) -> RequestLimits:
    """How much one request may ask for."""
    return RequestLimits(max_specs=settings.max_specs, max_maps=settings.max_maps)
