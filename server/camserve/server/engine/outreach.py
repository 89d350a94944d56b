"""Operators by which a model would reach outside of its computation: they read or write files, or call other processes.

`script.py` and `export_safety.py` refuse archives that call them: no model needs them to answer, and with them a file that was
handed over as a model is a program that reads the server's disk. What can be done with the operators that remain (allocate, loop,
crash) is told in SECURITY.md.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from camserve.server.errors import Reason, Unsupported

__all__ = ["check_code", "check_methods", "is_outreach", "outreach"]

# torch.from_file maps any file, torch.save writes one; debugprims::load_tensor reads one; the others call a peer.
_NAMES = frozenset({"from_file", "save", "load_tensor", "rpc_sync", "rpc_async", "rpc_remote"})
_KINDS = (
    "aten::from_file",
    "aten::save",
    "debugprims::load_tensor",
    "prim::rpc_sync",
    "prim::rpc_async",
    "prim::rpc_remote",
    "prim::PythonOp",
)
_WORDS = re.compile(rb"\b(?:" + b"|".join(sorted(name.encode() for name in _NAMES)) + rb")\b|getattr\([^)]*\\")


def is_outreach(operator: str) -> bool:
    """Whether an operator of a `.pt2` graph, such as `torch.ops.aten.from_file.default`, is one of them."""
    return not _NAMES.isdisjoint(operator.split("."))


def outreach(source: Path | BinaryIO, where: str, name: str) -> Unsupported:
    """The refusal of an archive that calls such an operator."""
    return Unsupported(
        Reason.MODEL_FAILED,
        f"{where} calls {name}, which reaches outside of the model: files, other processes; save the model without it",
        metadata={"file": source, "entry": where},
    )


def check_code(source: Path | BinaryIO) -> None:
    """Looks through the code of a TorchScript archive before it is loaded, since loading may already run some of it.

    Args:
        source: a path, or a stream, which is left at its beginning.

    Raises:
        Unsupported: it names such an operator.
        RuntimeError: it is no archive.
    """
    reader = torch._C.PyTorchFileReader(str(source) if isinstance(source, Path) else source)  # noqa: SLF001 - as torch reads it
    try:
        for entry in reader.get_all_records():
            if entry.startswith("code/") and entry.endswith(".py"):
                for name in _named_in(reader.get_record(entry)):
                    raise outreach(source, entry, name)
    finally:
        if not isinstance(source, Path):
            source.seek(0)


def check_methods(source: Path | BinaryIO, archive: torch.jit.ScriptModule) -> None:
    """Looks through the compiled methods of a loaded archive, in which names cannot be disguised.

    Raises:
        Unsupported: one calls such an operator.
    """
    for path, module in archive.named_modules():
        script: Any = module._c  # noqa: SLF001 - methods other than forward have no public name
        for method in script._method_names():  # noqa: SLF001
            graph = script._get_method(method).inlined_graph  # noqa: SLF001
            for kind in _KINDS:
                if graph.findAllNodes(kind):
                    raise outreach(source, f"{path or 'the model'}.{method}", kind)


def _named_in(code: bytes) -> Iterator[str]:
    """Attributes that are called like such an operator; a module or a variable of that name is none."""
    if _WORDS.search(code) is None:
        return  # Nearly always, and without parsing megabytes.
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield "something that is not readable beside the name of such an operator"
        return
    for node in nodes:
        match node:
            case ast.Attribute(
                attr=name, value=ast.Name(id="torch" | "aten") | ast.Attribute(attr="aten" | "debugprims")
            ):
                if name in _NAMES:
                    yield name
            case ast.Attribute(attr=name, value=ast.Name(id=variable)) if name in _NAMES and variable != "self":
                yield name
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=name)]) if name in _NAMES:
                yield str(name)
