"""Tries every method on every form of program and about every target, and notes what is refused, in the refusal's own words.

`page.py` calls `make_record`; nothing is judged here: loading, validation, readouts and passes are those of a server.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from camserve.client import Spec, TensorInput
from camserve.server import jobs
from camserve.server.cam.methods import METHODS, Method, Need
from camserve.server.engine.batches import make_batch
from camserve.server.engine.probe import probe
from camserve.server.engine.readouts import read
from camserve.server.errors import CamserveError
from camserve.server.jobs import OutputKind, Profile, Target
from camserve.server.local.explainer import LocalExplainer
from camserve.server.method_rules import check_method
from camserve.server.models.card import ModelCard
from camserve.server.models.loader import load_model
from camserve.server.models.method_cards import method_cards
from camserve.server.models.repository import ServedModel
from camserve.server.reference.models import SIDE, sources
from camserve.server.reference.record import Record
from camserve.server.settings import Settings
from camserve.server.target_rules import check_target

__all__ = ["BUDGETS", "TARGETS", "make_record"]

BUDGETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "score-cam": {"channels": 3},
    "ablation-cam": {"channels": 3},
    "ss-cam": {"channels": 2, "samples": 2},
    "is-cam": {"channels": 2, "steps": 2},
    "rise": {"samples": 4},
    "smoothgrad": {"samples": 2},
    "smooth-grad-cam++": {"samples": 2},
    "integrated-gradients": {"steps": 2},
    "occlusion": {"window": 16},
    "deep-feature-factorisation": {"concepts": 2},
}
"""Enough of an amplified method to see that it works."""

_CELLS: Final = np.pad(np.ones((2, 2), bool), ((0, SIDE - 2), (0, SIDE - 2)))
_BOX: Final = jobs.Box(left=0, top=0, width=8, height=8)
TARGETS: Final[Mapping[str, tuple[jobs.About, jobs.About]]] = {
    "predicted": (jobs.Predicted(), jobs.Predicted()),
    "class_index": (jobs.ClassIndex(1), jobs.ClassIndex(1)),
    "kth": (jobs.KthClass(1), jobs.KthClass(1)),
    "top": (jobs.TopClasses(1), jobs.TopClasses(1)),
    "above": (jobs.ClassesAbove(0.01), jobs.ClassesAbove(0.01)),
    "difference": (jobs.Difference(0, 1), jobs.Difference(0, 1)),
    "region": (jobs.Region(pixels=_BOX), jobs.PlacedRegion(cells=_CELLS)),
    "detection": (jobs.DetectionBox(_BOX), jobs.PlacedBox(_BOX)),
    "embedding": (jobs.Embedding((1.0, 0.0, 0.0, 0.0)), jobs.Embedding((1.0, 0.0, 0.0, 0.0))),
    "text": (jobs.Phrase("a phrase"), jobs.Embedding((1.0, 0.0, 0.0, 0.0))),
    "steps": (jobs.Steps(), jobs.Steps()),
}
"""By its name on the wire, each target as a request has it and as the engine is asked."""


def make_record() -> Record:
    """Tries everything; takes some seconds."""
    settings = Settings(device="cpu", max_batch_rows=64)
    programs: dict[str, dict[str, str]] = {slug: {} for slug in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        for source in sources(Path(folder)):
            with LocalExplainer(source, settings) as explainer:
                for slug, refusal in _on_program(explainer).items():
                    programs[slug][source.name] = _plain(refusal, source.name)
        convolutional = load_model(
            next(sources(Path(folder))), device=torch.device("cpu"), max_batch_rows=settings.max_batch_rows
        )
    return Record(programs=programs, targets=_about_targets(convolutional))


def _on_program(explainer: LocalExplainer) -> dict[str, str]:
    image = TensorInput(np.random.default_rng(0).standard_normal((3, SIDE, SIDE)).astype(np.float32))
    refusals = {told.method: told.note for told in explainer.card.methods if not told.works}
    working = [slug for slug in METHODS if slug not in refusals]
    for start in range(0, len(working), 16):
        asked = working[start : start + 16]
        result = explainer.explain(image, [Spec(slug, **BUDGETS.get(slug, {})) for slug in asked])
        refusals |= {asked[failed.spec_index]: failed.error.message for failed in result.errors}
    return {slug: refusals.get(slug, "") for slug in METHODS}


def _about_targets(model: ServedModel) -> dict[str, dict[str, dict[str, str]]]:
    told: dict[str, dict[str, dict[str, str]]] = {slug: {} for slug in METHODS}
    recipe = model.card.recipe
    noise = torch.randn((2, *recipe.shape), generator=torch.Generator().manual_seed(0))
    report = probe(model.program, noise)
    for kind in OutputKind:
        card = dataclasses.replace(model.card, output_kind=kind, phrases=("a phrase",), methods=())
        other = dataclasses.replace(model.pass_model, kind=kind)
        refused = {
            entry.slug: "" if entry.works else entry.note
            for entry in method_cards(other, [make_batch(noise, 1)], report)
        }
        for slug, method in METHODS.items():
            # Only its head ties a method to a kind of output: the rest is about the program, whose turn it was above.
            if Need.LINEAR_HEAD in method.needs and refused[slug]:
                told[slug][kind.value] = {"": refused[slug]}
            elif not method.has_target:
                told[slug][kind.value] = {"": "takes no target: one map, about no class"}
            else:
                told[slug][kind.value] = {
                    name: _plain(_about(method, kind, card, *abouts), kind.value) for name, abouts in TARGETS.items()
                }
    return told


def _about(method: Method, kind: OutputKind, card: ModelCard, asked: jobs.About, placed: jobs.About) -> str:
    """Why a method is refused a target; empty if it is not."""
    contrast = None if method.contrast is None else method.contrast[Profile.PAPER]
    try:
        check_method(jobs.Spec(index=0, method=method.slug, layers=(), target=Target(about=asked)), card, "spec")
        check_target(Target(about=asked), card, "target")
        read(kind, _outputs(kind), "", rows=1, classes=4).aims(0, Target(about=placed), contrast)
    except CamserveError as error:
        return error.message
    return ""


def _outputs(kind: OutputKind) -> Any:
    """What a model of this kind returns for one row; scores that differ."""
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    match kind:
        case OutputKind.SEGMENTATION:
            # Both classes are predicted somewhere.
            cells = scores[:, :, None, None].repeat(1, 1, SIDE, SIDE)
            cells[:, 1, SIDE // 2 :] += 2
            return cells
        case OutputKind.SEQUENCE:
            return scores[:, None].expand(1, 3, 4).contiguous()
        case OutputKind.DETECTION:
            box = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
            return [{"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}]
    return scores


def _plain(refusal: str, name: str) -> str:
    """A refusal without what is only of the model that was tried."""
    return re.sub(rf" (of|on) model '{re.escape(name)}'( \([a-z]+\))?| model '[a-z-]+',", " this model", refusal)
