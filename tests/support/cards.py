"""Cards and jobs made by hand, for tests of stages that need no model."""

from __future__ import annotations

import dataclasses
from typing import Any

from camserve.server import jobs
from camserve.server.cam.methods import METHODS
from camserve.server.models.card import LayerCard, MethodCard, ModelCard
from camserve.server.models.recipe import InputRecipe

LABELS = ("cat", "dog", "crane", "lorry")


def card(**changes: Any) -> ModelCard:
    """A model of four classes with two layers that give maps and one that gives none."""
    made = ModelCard(
        name="tiny",
        version="1",
        labels=LABELS,
        class_count=4,
        recipe=InputRecipe(shape=(3, 32, 32), mean=(0.0,), std=(1.0,)),
        kind="torchscript",
        device="cpu",
        dtype="float32",
        layers=(
            LayerCard(
                name="stem",
                spellings=("stem", "stem#0"),
                shape=(8, 16, 16),
                layout="channels-first",
                map_shape=(16, 16),
            ),
            LayerCard(
                name="body", spellings=("body", "body#0"), shape=(16, 8, 8), layout="channels-first", map_shape=(8, 8)
            ),
            LayerCard(name="head", spellings=("head", "head#0"), shape=(4,), refusal="it has no spatial extent"),
        ),
        default_layer="body",
        methods=tuple(MethodCard(slug=slug, works=True) for slug in METHODS),
        weights_sha256="a" * 64,
        code_sha256="b" * 64,
        model_sha256="c" * 64,
        max_batch_rows=16,
        static_batch_rows=None,
        rows_independent=True,
        warm_up_seconds=0.25,
    )
    return dataclasses.replace(made, **changes)


def job(*specs: jobs.Spec, **changes: Any) -> jobs.Job:
    """A request for that model."""
    made = jobs.Job(
        request_id="r-1",
        model="tiny",
        version="1",
        payload=jobs.EncodedImage(data=b"not looked at"),
        specs=specs,
        top_k=1,
        received_at=0.0,
    )
    return dataclasses.replace(made, **changes)


def spec(index: int = 0, **changes: Any) -> jobs.Spec:
    """Grad-CAM at the default layer."""
    return dataclasses.replace(jobs.Spec(index=index, method="grad-cam", layers=("body",)), **changes)
