"""What is known about a loaded model: made once by `loader.py`, read by validation, wire and the pipeline. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from camserve.server.jobs import Condition, OutputKind, Spec
from camserve.server.models.recipe import InputRecipe

__all__ = ["ExtraInput", "LayerCard", "MethodCard", "ModelCard", "PlanCard", "RuleCard"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerCard:
    """One place that can be named in a spec.

    Attributes:
        name: as written in a spec, such as `layer4` or `layer4.1.relu#0`.
        spellings: every name that means this place, `name` among them.
        shape: of its value for one row, as the model lays it out.
        layout: `channels-first`, `channels-last`, `tokens`, or empty when no map can be made.
        map_shape: sizes of a map made there.
        refusal: why none can; empty when one can.
        gradient_refusal: why methods that need a gradient cannot make one, though others can; empty when they can as well.
    """

    name: str
    spellings: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    layout: str = ""
    map_shape: tuple[int, ...] = ()
    refusal: str = ""
    gradient_refusal: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MethodCard:
    """Whether one method works on this model, and why not or where only."""

    slug: str
    works: bool
    note: str = ""
    only_layers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExtraInput:
    """An input that a request must send besides the first.

    Attributes:
        name: in the request.
        shape: of one row.
        dtype: numpy name, such as `float32`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanCard:
    """How the model is run, as chosen at load on this device.

    Attributes:
        form: such as `folded, channels last, fused up to layer4`, or `as loaded`.
        speedup: of a forward over that of the program as loaded.
        deviation: largest difference of an output from the program as loaded, relative to the largest output.
        threads: of a kernel on a CPU; 0 for torch's own number.
        chunk_rows: inputs that an amplified method tries before others get their turn.
    """

    form: str = "as loaded"
    speedup: float = 1.0
    deviation: float = 0.0
    threads: int = 0
    chunk_rows: int = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RuleCard:
    """When to explain without being asked.

    Attributes:
        name: in answers, metrics and logs.
        when: the condition as it was written; empty when it always holds.
        sample: share of the requests it is applied to, 0 to 1.
        asks: what it asks for as it was written, in the fields and words of the wire's `Spec`.
        spec: the same, read; its index is that of no request.
        condition: `when`, compiled; None when it always holds.
    """

    name: str
    when: str
    sample: float
    asks: Mapping[str, object]
    spec: Spec
    condition: Condition | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """A loaded model, as callers see it.

    Attributes:
        name: in the repository.
        version: likewise.
        labels: by class index; empty when unknown.
        class_count: outputs of the model.
        recipe: how images become its input.
        kind: `torchscript`, `export` or `eager`.
        device: such as `cpu`.
        dtype: such as `float32`.
        layers: every tap, in order of execution.
        default_layer: used when a spec names none.
        methods: what can be asked of it.
        weights_sha256: hexadecimal.
        code_sha256: hexadecimal.
        model_sha256: over both.
        max_batch_rows: most rows in one pass.
        static_batch_rows: the only batch size it takes, or None.
        rows_independent: whether rows of a batch leave each other alone.
        warm_up_seconds: what loading and checking took.
        notes: what a reader should know.
        output_kind: what it returns, and so what can be asked about.
        stages: the last layer of each resolution that gives a map, shallowest first.
        phrases: those whose embeddings are held for text targets.
        extra_inputs: what a request must send besides the first input, in the model's order.
        plan: how it is run.
        rules: when to explain without being asked.
        memory_bytes: of parameters and buffers, in every form held.
    """

    name: str
    version: str
    labels: tuple[str, ...]
    class_count: int
    recipe: InputRecipe
    kind: str
    device: str
    dtype: str
    layers: tuple[LayerCard, ...]
    default_layer: str
    methods: tuple[MethodCard, ...]
    weights_sha256: str
    code_sha256: str
    model_sha256: str
    max_batch_rows: int
    static_batch_rows: int | None
    rows_independent: bool
    warm_up_seconds: float
    notes: tuple[str, ...] = ()
    output_kind: OutputKind = OutputKind.CLASSIFICATION
    stages: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()
    extra_inputs: tuple[ExtraInput, ...] = ()
    plan: PlanCard = PlanCard()
    rules: tuple[RuleCard, ...] = ()
    memory_bytes: int = 0

    def label(self, class_index: int | None) -> str:
        """The label of a class; empty when the card has none, and for what is about no class."""
        return "" if class_index is None or class_index >= len(self.labels) else self.labels[class_index]

    def layer(self, name: str) -> LayerCard | None:
        """The layer of that written name, or None."""
        return next((layer for layer in self.layers if name == layer.name or name in layer.spellings), None)

    def spellings(self, name: str) -> tuple[str, ...]:
        """Every name of the layer of that name: `layer2` and, where it is called once, `layer2#0`."""
        layer = self.layer(name)
        return (name,) if layer is None else (layer.name, *layer.spellings)

    def method(self, slug: str) -> MethodCard | None:
        """What the card says of a method, or None."""
        return next((method for method in self.methods if method.slug == slug), None)
