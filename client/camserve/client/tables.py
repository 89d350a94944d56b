"""Models and their cards as tables for people; `cli_models.py` prints them on standard output."""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from camserve.client import words
from camserve.client.cards import ModelCard, ModelStatus, RuleInfo


def show_statuses(statuses: tuple[ModelStatus, ...]) -> None:
    """Prints one row for each model."""
    table = Table(title="Models")
    for heading in ("name", "version", "state", "classes", "default layer", "error"):
        table.add_column(heading)
    colours = {"ready": "green", "loading": "yellow", "unloading": "yellow", "failed": "red", "unloaded": "dim"}
    for status in statuses:
        state = f"[{colours.get(status.state, 'default')}]{escape(status.state)}[/]"
        classes = str(status.class_count) if status.state == "ready" else ""
        version = " ".join([status.version, *(f"({label})" for label in status.version_labels)])
        table.add_row(
            escape(status.name),
            escape(version),
            state,
            classes,
            escape(status.default_layer),
            escape(status.error),
        )
    Console().print(table)


def _plan(card: ModelCard) -> str:
    plan = card.plan
    gain = f", {plan.speedup:.2f} x as fast, outputs within {plan.deviation:.0e}" if plan.speedup != 1 else ""
    threads = f", {plan.threads} threads" if plan.threads > 1 else ""
    return f"{plan.form}{gain}{threads}; amplified methods by {plan.chunk_rows} rows"


def show_card(card: ModelCard) -> None:
    """Prints what is known about a model, then its layers and its methods."""
    console = Console()
    facts = Table(title=f"{escape(card.name)}, version {escape(card.version)}", show_header=False)
    facts.add_column()
    facts.add_column(overflow="fold")  # A digest that is cut short cannot be compared.
    labels = ", ".join(card.labels[:10]) + (" …" if len(card.labels) > 10 else "")
    shape = _sizes(card.input.shape)
    for key, value in (
        *([("returns", card.output_kind)] if card.output_kind else []),
        ("classes", f"{card.class_count}: {labels}" if labels else str(card.class_count)),
        ("input", f"{shape} {card.input.channels}, {card.input.resize}"),
        *(("input", f"{extra.name}: {_sizes(extra.shape)} {extra.dtype}") for extra in card.extra_inputs),
        *([("stages", ", ".join(card.stages))] if card.stages else []),
        *([("phrases", ", ".join(card.phrases))] if card.phrases else []),
        ("kind", f"{card.kind} on {card.device} in {card.dtype}"),
        ("batch", _batch(card)),
        *([("plan", _plan(card))] if card.plan.form else []),
        ("model sha256", card.model_sha256),
        ("of its weights", card.weights_sha256),
        ("of its code", card.code_sha256),
        *([("memory", f"{card.memory_bytes / 2**20:.1f} MiB")] if card.memory_bytes else []),
        ("warm-up", f"{card.warm_up_seconds:.2f} s"),
        *(("rule", _rule(rule)) for rule in card.rules),
        *(("note", note) for note in card.notes),
    ):
        facts.add_row(key, escape(value))
    console.print(facts)

    layers = Table(title="Layers")
    for heading in ("name", "shape", "layout", "map", "refusal"):
        layers.add_column(heading, overflow="fold")
    for layer in card.layers:
        name = f"{layer.name} (default)" if layer.name == card.default_layer else layer.name
        layers.add_row(escape(name), _sizes(layer.shape), layer.layout, _sizes(layer.map_shape), escape(layer.refusal))
    console.print(layers)

    methods = Table(title="Methods")
    for heading in ("method", "works", "note"):
        methods.add_column(heading)
    for method in card.methods:
        methods.add_row(method.method, "[green]yes[/]" if method.works else "[red]no[/]", escape(method.note))
    console.print(methods)


def _rule(rule: RuleInfo) -> str:
    asks = dict(rule.asks)
    method = words.METHODS.word(rule.spec.method)
    rest = {name: value for name, value in asks.items() if name != "method"}
    how = f" with {json.dumps(rest)}" if rest else ""
    share = "" if rule.sample == 1 else f" in {rule.sample:.4g} of the requests"
    when = f" when {rule.when}" if rule.when else ""
    return f"{rule.name}: {method}{how}{share}{when}"


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _batch(card: ModelCard) -> str:
    is_static = card.static_batch_rows is not None
    rows = f"exactly {card.static_batch_rows} rows" if is_static else f"up to {card.max_batch_rows} rows"
    return rows if card.rows_independent else f"{rows}; rows influence each other, so each goes alone"
