"""A pass on a compiled package: what `passes.py` sees of it is a `PassGraph` whose one gradient is there already.

The forward cannot be had without the gradient, so that both count as the forward's time and the prediction leaves after both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from camserve.server.engine.compiled import PREDICTED, LivePackage
from camserve.server.engine.graph import Chosen, Gradients, PassGraph
from camserve.server.engine.plan import PassModel
from camserve.server.engine.program import TapName
from camserve.server.engine.readouts.terms import signs
from camserve.server.jobs import Spec

__all__ = ["CompiledGraph", "compiled_graph", "filled"]


class CompiledGraph(PassGraph):
    """What a package left for the rows of a batch.

    Args:
        model: whose.
        outputs: (b, classes).
        activations: at every name of the layer.
        gradient: (b, ...) of each row's class.
        classes: those classes.
    """

    def __init__(
        self,
        model: PassModel,
        outputs: Tensor,
        activations: Mapping[TapName, Tensor],
        *,
        gradient: Tensor,
        classes: Sequence[int],
    ) -> None:
        # The package has taken the outputs from where the card says.
        super().__init__(dataclasses.replace(model, output_path=""), outputs, activations, len(outputs))
        self._gradient: Tensor | None = gradient
        self._classes = classes

    def gradients(self, chosen: Sequence[Chosen | None], taps: Sequence[TapName]) -> Gradients:
        """The gradient that the package computed, turned by each row's polarity.

        Raises:
            ValueError: a row is about another class than the package was told; this would be a bug.
        """
        gradient = self._gradient
        if gradient is None:
            raise ValueError("the gradient of a released graph is gone")
        aims = [one[1] if one else None for one in chosen]
        for aim, differentiated in zip(aims, self._classes, strict=True):
            if aim is not None and aim.weights != ((differentiated, 1.0),):
                raise ValueError(f"class {differentiated} was differentiated, and {aim.weights} were asked for: a bug")
        turned = signs(aims, gradient)
        if bool((turned < 0).any()):
            gradient = gradient * turned.view(-1, *[1] * (gradient.ndim - 1))
        return dict.fromkeys(taps, gradient)

    def release(self) -> None:
        """Frees what the package left."""
        super().release()
        self._gradient = None


def compiled_graph(model: PassModel, batch: Tensor, rows: Sequence[Sequence[Spec]]) -> CompiledGraph | None:
    """Runs a batch on the model's compiled plan.

    Args:
        model: what runs.
        batch: (b *input), on its device, in its dtype.
        rows: the specs of each row; none for rows that nobody waits for.

    Returns:
        None if a row wants what no package gives, or none is live for so many rows.
    """
    plan = model.compiled
    package = plan.package_for(len(batch)) if plan is not None else None
    if plan is None or package is None:
        return None
    classes = [plan.class_of(specs) for specs in rows]
    if None in classes:
        return None
    asked = [PREDICTED if index is None else index for index in classes]
    found = package.run(*filled(package, batch, torch.tensor(asked, device=batch.device)))
    outputs, activation, gradient, differentiated = (value[: len(batch)] for value in found)
    activations = dict.fromkeys(plan.taps.values(), activation)
    return CompiledGraph(model, outputs, activations, gradient=gradient, classes=differentiated.tolist())


def filled(package: LivePackage, batch: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many rows as the package takes: copies of the last are added, which nobody reads.

    They are contiguous: a package reads its inputs as they lay when it was traced, and does not look.
    """
    missing = package.rows - len(batch)
    if missing:
        batch = torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])
        classes = torch.cat([classes, classes[-1:].expand(missing)])
    return batch.contiguous(), classes
