"""Looks through a `.pt2` archive for what would run as Python code while it is read, before `torch.export.load` reads it.

Arrives: the file, unread. Leaves: its graphs, or a refusal that names the entry. `export.py` asks. Entries are found with the
readers and by the rules of PyTorch, so that what is checked here is what is loaded there. Looking executes nothing.

This closes the known ways. PyTorch does not call its archives safe to read from strangers, and neither does camserve.
"""

from __future__ import annotations

import ast
import io
import json
import math
import operator
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._export.serde.serialize import _SYM_OPS
from torch.utils._sympy import functions as shape_functions

from camserve.server.engine.outreach import is_outreach, outreach
from camserve.server.errors import Reason, Unsupported

__all__ = ["check_archive"]

# Archives are not compressed. One that somebody packed again may grow this much, one that grows more is a bomb.
_GROWTH = 8
_SMALL = 1 << 26

_PICKLED = "holds pickled Python objects"
_MODELS = "models/"
_COMPILED = "data/aotinductor/"
# Up to PyTorch 2.7 archives had other entries, and such archives are still read.
_LEGACY_GRAPH = "serialized_exported_program.json"
_LEGACY_PICKLE = re.compile(r"serialized_(state_dict|constants|example_inputs)\.(pt|json)")

# What sizes are written as: `Add(Mul(Integer(3), Symbol('s0', positive=True, integer=True)), Integer(1))`, or `3*s0 + 1`.
_FUNCTIONS = frozenset(
    {
        *shape_functions.__all__,
        *(
            "Symbol",
            "Integer",
            "Float",
            "Rational",
            "Add",
            "Mul",
            "Pow",
            "Mod",
            "Abs",
            "Max",
            "Min",
            "And",
            "Or",
            "Not",
        ),
        *("Equality", "Unequality", "LessThan", "GreaterThan", "StrictLessThan", "StrictGreaterThan", "Eq", "Ne"),
        *("Piecewise", "ExprCondPair", "floor", "ceiling"),
    }
)
_SYNTAX = (
    ast.Expression,
    ast.UnaryOp,
    ast.BinOp,
    ast.Compare,
    ast.keyword,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
    ast.Load,
)
# What a node may call: an operator with its overload, or arithmetic on sizes; torch itself tells which of those exist.
_OPERATOR = re.compile(
    r"torch\.ops\.[a-z]\w*(\.[a-zA-Z]\w*|\._(?!_)\w*){1,2}|_operator\.[a-z]\w*|math\.[a-z]\w*|torch\.sym_\w+"
    r"|torch\._functorch\.predispatch\.\w+"
)
_TRACED_WRAPPERS = "torch._functorch.predispatch"
_NAME = re.compile(r"[\w.]*")
_PLAIN_TEXT = re.compile(r"[\w.+-]*")


def check_archive(source: Path | BinaryIO) -> list[bytes]:
    """Refuses an archive that holds code.

    Args:
        source: a path, or a stream, which is left at its beginning.

    Returns:
        The graphs in it, as JSON.

    Raises:
        Unsupported: an entry is a pickle of more than tensors and plain values, a compiled library, an object of a class, or a
            graph that calls something else than operators, or has text in it that PyTorch would evaluate and that is no size.
        RuntimeError, ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile: it is no archive of `torch.export.save`.
    """
    graphs = []
    try:
        for name, entry, is_graph in _entries(source):
            if is_graph:
                _check_graph(source, name, json.loads(entry))
                graphs.append(entry)
            else:
                _check_pickle(source, name, entry)
    finally:
        if not isinstance(source, Path):
            source.seek(0)
    return graphs


def _entries(source: Path | BinaryIO) -> Iterator[tuple[str, bytes, bool]]:
    """Every entry that PyTorch would unpickle, and every graph. One at a time, since the weights may be among them."""
    with zipfile.ZipFile(source) as archive:
        size = _size(source)
        if sum(info.file_size for info in archive.infolist()) > _GROWTH * size + _SMALL:
            raise ValueError(f"its {size} bytes unpack to more than {_GROWTH} times as many")
        names = set(archive.namelist())
        if "version" in names:
            for name in names:
                if name == _LEGACY_GRAPH or _LEGACY_PICKLE.fullmatch(name):
                    yield name, archive.read(name), name == _LEGACY_GRAPH
    if not isinstance(source, Path):
        source.seek(0)
    reader = torch._C.PyTorchFileReader(str(source) if isinstance(source, Path) else source)  # noqa: SLF001
    known = reader.get_all_records()
    for name in known:
        if name.startswith(_COMPILED):
            raise _refusal(source, name, "holds compiled libraries")
        if name.startswith(_MODELS):
            yield name, reader.get_record(name), True
            model = name[len(_MODELS) : -len(".json")]
            for pickled in _pickled(source, reader, model):
                yield pickled, reader.get_record(pickled), False


def _size(source: Path | BinaryIO) -> int:
    return source.stat().st_size if isinstance(source, Path) else source.seek(0, os.SEEK_END)


def _pickled(source: Path | BinaryIO, reader: Any, model: str) -> Iterator[str]:
    """The entries of one model that are unpickled: its sample inputs, and of its tensors those that its tables say are."""
    yield f"data/sample_inputs/{model}.pt"
    known = reader.get_all_records()
    for kind in ("weights", "constants"):
        if f"data/{kind}/{model}.pt" in known:
            yield f"data/{kind}/{model}.pt"
        table = f"data/{kind}/{model}_{kind}_config.json"
        if table not in known:
            continue
        for payload in json.loads(reader.get_record(table))["config"].values():
            name = f"data/{kind}/{payload['path_name']}"
            if str(payload["path_name"]).startswith(("custom_obj_", "opaque_obj_")):
                raise _refusal(source, name, _PICKLED)
            if payload["use_pickle"]:
                yield name


def _check_pickle(source: Path | BinaryIO, name: str, entry: bytes) -> None:
    if not entry:
        return
    try:
        torch.load(io.BytesIO(entry), map_location="cpu", weights_only=True)
    except Exception as error:  # Whatever it is: PyTorch would read the entry again, without restraint.
        raise _refusal(source, name, _PICKLED) from error


def _check_graph(source: Path | BinaryIO, name: str, graph: Any) -> None:
    """Sizes are evaluated, and names become part of Python code."""
    todo = [graph]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        if isinstance(value, Mapping):
            todo += value.values()
            if "inputs" in value and "target" in value:
                _check_operator(source, name, value["target"])
            if "expr_str" in value and not _is_size(value["expr_str"]):
                raise _refusal(source, name, "holds expressions in place of sizes")
            if any(not _is_name(value[key]) for key in ("name", "as_name") if key in value):
                raise _refusal(source, name, "holds expressions in place of names")


def _check_operator(source: Path | BinaryIO, name: str, target: Any) -> None:
    """What a node calls is found by its dotted name from torch on, where everything that torch has imported lies as well."""
    if not isinstance(target, str) or not _is_operator(target):
        raise Unsupported(
            Reason.MODEL_FAILED,
            f"{name} in {source} calls {str(target)[:100]!r}, which is no operator; write it anew with torch.export.save",
            metadata={"file": source, "entry": name},
        )
    if is_outreach(target):
        raise outreach(source, name, target)


def _is_operator(target: str) -> bool:
    if not _OPERATOR.fullmatch(target):
        return False
    found: Any = {"torch": torch, "_operator": operator, "math": math}[target.partition(".")[0]]
    for part in target.split(".")[1:]:
        # Not with a default: names of operators are looked up, and made, on demand.
        if not hasattr(found, part):
            return True  # PyTorch itself says that it knows no such operator, and how to register one.
        found = getattr(found, part)
    if isinstance(found, torch._ops.OpOverload | torch._ops.HigherOrderOperator):  # noqa: SLF001 - they have no public name
        return True
    return found in _SYM_OPS or getattr(found, "__module__", "") == _TRACED_WRAPPERS


def _is_name(text: Any) -> bool:
    return text is None or (isinstance(text, str) and _NAME.fullmatch(text) is not None)


def _is_size(text: Any) -> bool:
    """Whether a text is arithmetic on sizes, and no other call or attribute of anything."""
    if not isinstance(text, str) or "\n" in text:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_part_of_size(node) for node in nodes)


def _is_part_of_size(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id=function)):
            return function in _FUNCTIONS
        case ast.Name(id=name):
            return not name.startswith("_")
        case ast.Constant(value=str(text)):
            return _PLAIN_TEXT.fullmatch(text) is not None
        case ast.Constant(value=value):
            return isinstance(value, int | float)
    return isinstance(node, _SYNTAX)


def _refusal(source: Path | BinaryIO, name: str, what: str) -> Unsupported:
    return Unsupported(
        Reason.MODEL_FAILED,
        f"{name} in {source} {what}, which run code when read; re-export with tensors only",
        metadata={"file": source, "entry": name},
    )
