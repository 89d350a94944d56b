"""The process that compiles one package of a model: reads an `Order` from standard input, loads the model, writes the file.

`compiling.py` starts it. Being a process of its own, at the lowest priority, it takes neither interpreter nor device thread from
the server. It exits with 0 when the file is there, else with 1 and the reason in the last line of standard error.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from camserve.server.engine.batches import make_batch
from camserve.server.engine.compiled_build import build_package, check_compiler, explanation_of
from camserve.server.engine.look import message_of
from camserve.server.engine.program import TapName
from camserve.server.models.config import ModelConfig
from camserve.server.models.loader import load_program
from camserve.server.models.sources import ModelSource

__all__ = ["Order", "main"]

_LONGEST_REASON = 600  # It goes on the card.


class Order(BaseModel):
    """One package to be made.

    Attributes:
        name: of the model.
        version: likewise.
        model: archive or weights; None for a factory that needs none.
        config: the written part of its card.
        shape: of one row.
        layer: that is explained.
        rows: that the package takes.
        threads: that it uses.
        path: to write.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str
    version: str
    model: Path | None
    config: ModelConfig
    shape: tuple[int, ...]
    layer: str
    rows: int
    threads: int
    path: Path


def main() -> int:
    """Does what standard input says; returns the exit status."""
    warnings.simplefilter("ignore")  # Standard error tells one thing: why it failed.
    order = Order.model_validate_json(sys.stdin.read())
    try:
        _build(order)
    except Exception as error:  # noqa: BLE001 - the tracer, the compiler and the model are foreign code
        print(message_of(error)[:_LONGEST_REASON], file=sys.stderr)  # noqa: T201 - read by `compiling.py`
        return 1
    return 0


def _build(order: Order) -> None:
    check_compiler()
    torch.set_num_threads(order.threads)
    source = ModelSource(name=order.name, version=order.version, path=order.model, config=order.config)
    program = load_program(source, torch.device("cpu"))
    noise = torch.randn((1, *order.shape), generator=torch.Generator().manual_seed(0))
    build_package(
        explanation_of(
            program, TapName.parse(order.layer), kind=order.config.output.kind, output_path=order.config.output.path
        ),
        make_batch(noise.to(program.dtype), order.rows),
        order.path,
    )
