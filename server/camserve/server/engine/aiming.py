"""What a target means for a row of a pass, with what lies outside the outputs looked up: phrases and reference images.

`passes.py` makes one `Aimer` from the forward and hands it to `plan.settle`.
"""

from __future__ import annotations

import dataclasses

import torch

from camserve.server.cam.methods import Contrast
from camserve.server.engine.graph import PassGraph, moved
from camserve.server.engine.plan import PassModel
from camserve.server.engine.readouts import Aim, read
from camserve.server.errors import NotFound, Reason
from camserve.server.jobs import Embedding, OutputKind, Phrase, ReferenceTensor, Target

__all__ = ["Aimer"]


class Aimer:
    """Answers what a target means for a row; see `plan.Aiming`."""

    def __init__(self, model: PassModel, graph: PassGraph) -> None:
        self._model = model
        self._graph = graph

    def __call__(self, row: int, target: Target, contrast: Contrast | None) -> tuple[Aim, ...]:
        """As `Readout.aims`; raises NotFound for a phrase that the card does not hold."""
        readout = self._graph.readout(target.output_path)
        about = target.about
        if isinstance(about, Phrase):
            vector = self._phrase(about.text)
            aims = readout.aims(row, dataclasses.replace(target, about=vector), contrast)
            return tuple(
                dataclasses.replace(aim, target=dataclasses.replace(aim.target, phrase=about.text)) for aim in aims
            )
        if isinstance(about, ReferenceTensor):
            target = dataclasses.replace(target, about=self._reference(about, target.output_path))
        return readout.aims(row, target, contrast)

    def _phrase(self, text: str) -> Embedding:
        if text not in self._model.phrases:
            known = ", ".join(map(repr, list(self._model.phrases)[:12])) or "none"
            raise NotFound(
                Reason.LABEL_NOT_FOUND,
                f"phrase {text!r} is not on the model's card; phrases it holds: {known}",
                metadata={"phrase": text},
            )
        return Embedding(tuple(map(float, self._model.phrases[text])))

    def _reference(self, about: ReferenceTensor, path: str) -> Embedding:
        """The model's embedding of another image, as one row more of its own."""
        value = moved(self._model, torch.from_numpy(about.values)[None])
        static = self._model.static_rows or 1
        outputs = self._model.program.run(value.expand(static, *value.shape[1:]).contiguous())
        where = path or self._model.output_path
        readout = read(OutputKind.EMBEDDING, outputs, where, rows=static, classes=self._model.classes)
        return Embedding(tuple(map(float, readout.readings()[0].scores)))
