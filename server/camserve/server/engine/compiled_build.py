"""Traces a program's forward and gradient into one inference graph and compiles it into a package, a `.pt2` file of AOTInductor.

`models/compiling.py` calls `build_package` in a process of its own, since compiling takes a minute of a core, and `load_package`
in the one that serves. The graph is what the dispatcher sees while the program captures the layer, the same for scripted,
exported and eager programs: plain operators without autograd, so that Inductor may fold constants and batch normalisations into
weights and lay those out for the kernels. A program whose operators depend on the values of its input is refused by the tracer.

It is compiled for the number of threads that is set while it is, and for this machine's instructions. Torch's compiler is
imported by those functions that need it: that takes as long as all the rest of torch, and few servers compile anything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from camserve.server.engine.compiled import PREDICTED, Package
from camserve.server.engine.look import message_of
from camserve.server.engine.program import Program, TapName
from camserve.server.engine.readouts import select_output
from camserve.server.jobs import OutputKind

__all__ = ["build_package", "check_compiler", "explanation_of", "load_package", "traced"]


def explanation_of(program: Program, tap: TapName, *, kind: OutputKind, output_path: str) -> Package:
    """The function that a package is compiled from, run by the program itself.

    Args:
        program: what is explained.
        tap: where.
        kind: of its output, (b, classes).
        output_path: where in what the program returns.
    """

    def explain(batch: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        captured = program.capture([tap], batch)
        outputs, activation = select_output(kind, captured.outputs, output_path), captured.activations[tap]
        meant = torch.where(classes == PREDICTED, outputs.detach().argmax(1), classes)
        with torch.enable_grad():
            total = outputs.gather(1, meant[:, None]).sum()
            (gradient,) = torch.autograd.grad(total, [activation])
        return outputs.detach(), activation.detach(), gradient, meant

    return explain


def check_compiler() -> None:
    """Looks for the C++ compiler that torch would use.

    Raises:
        RuntimeError: there is none.
    """
    from torch._inductor import cpp_builder, exc  # noqa: PLC0415 - as told above.

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise RuntimeError("there is no C++ compiler; install g++, or name another one in CXX") from error


def build_package(explain: Package, batch: Tensor, path: Path) -> None:
    """Writes the package; blocks for as long as compiling takes.

    Args:
        explain: from `explanation_of`.
        batch: (b *input) of the number of rows wanted, contiguous.
        path: of the file, which appears whole or not at all; ends in `.pt2`.

    Raises:
        RuntimeError: the program depends on its input's values, or there is no C++ compiler, or it failed.
    """
    from torch._inductor import aoti_compile_and_package  # noqa: PLC0415 - as told above.

    classes = torch.full((len(batch),), PREDICTED)
    graph = traced(explain, batch, classes)
    with torch.no_grad():
        exported = torch.export.export(graph, (batch, classes))
        unfinished = path.with_name(f"{path.stem}.{os.getpid()}.pt2")
        try:
            aoti_compile_and_package(
                exported, package_path=str(unfinished), inductor_configs={"freezing": True, "compile_threads": 1}
            )
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def traced(explain: Package, batch: Tensor, classes: Tensor) -> torch.fx.GraphModule:
    """The operators that are run for a batch, as a graph that takes any other batch of its shape.

    Raises:
        RuntimeError: they cannot be had, as where the values of the batch decide which are run.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415 - as told above.

    explain(batch, classes)  # The first forward of some programs also looks at them.
    try:
        graph = make_fx(explain)(batch, classes)
    except RuntimeError as error:
        raise RuntimeError(
            f"its operators could not be traced, as where a branch depends on values of the input ({message_of(error)})"
        ) from error
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def load_package(path: Path) -> Package:
    """Loads what `build_package` wrote; this runs code from the file.

    Raises:
        RuntimeError: it is no such file, or of another version of torch.
    """
    from torch._inductor import aoti_load_package  # noqa: PLC0415 - as told above.

    loaded = aoti_load_package(str(path))

    def run(batch: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found: Sequence[Tensor] = loaded(batch, classes)
        outputs, activation, gradient, meant = found
        return outputs, activation, gradient, meant

    return run
