"""The graph of a TorchScript archive, made ready for surgery: every private torch call the engine makes is in this file.

Arrives: a loaded `ScriptModule`. Leaves: one flat graph in which every module call is inlined, control flow that the archive's
own settings decide is gone, and behind each call stands a *mark* that knows the path, number and value of that call.
`script_places.py` reads marks, `script_taps.py` turns them into taps and cuts, `script.py` owns the result.

A mark is two nodes. `prim::unchecked_cast` hands the returned value on: it is an identity for every type, which alias analysis
and all passes used here understand. `prim::Print` behind it counts as an effect, so no pass drops the call from the list, even
if nothing uses its value. No mark survives into a compiled function, so nothing is ever printed.
"""
# Module hooks do not exist on ScriptModules and torch has no public interface to their graphs. The names below are
# those that torch's own tracing, freezing and ONNX code use; each function here says which one it wraps and why.
# ruff: noqa: SLF001

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Block",
    "Chain",
    "Graph",
    "Node",
    "Value",
    "attribute_tensors",
    "code_of",
    "compiled",
    "constant_of",
    "constant_tensors",
    "copied",
    "discard_unused",
    "forget",
    "forward_arguments",
    "fused",
    "insert_constants",
    "integer",
    "interpreted",
    "is_mark",
    "mark_after",
    "mark_calls",
    "mark_operators",
    "marked_graph",
    "marked_outputs",
    "marks",
    "number_marks",
    "number_of",
    "operators_marked",
    "optional",
    "receiver",
    "record_of",
    "retarget_constants",
    "tensor",
    "tuple_of",
    "unmark",
    "walk",
    "written_arguments",
]

# The stubs of torch._C leave out most methods of these classes.
Graph: TypeAlias = Any
Block: TypeAlias = Any
Node: TypeAlias = Any
Value: TypeAlias = Any
Chain: TypeAlias = tuple[tuple[Node, int], ...]
"""The `prim::If`s and `prim::Loop`s around a node, outermost first, each with the number of the block the node is in."""

_MARK, _RECORD = "prim::unchecked_cast", "prim::Print"

# How the methods are called that a module call runs: scripted overloads are `forward__0`; a trace names a module's second
# call `forward1`.
_FORWARD = re.compile(r"forward(__)?\d*")

_IMMUTABLE_KINDS = frozenset({"BoolType", "IntType", "FloatType", "StringType", "NoneType", "TupleType"})
_CONTAINER_KINDS = frozenset({"DictType", "ListType"})
# In eval mode these return their input itself, though their schemas promise new memory.
_DROPOUTS = frozenset(
    f"aten::{name}{ending}"
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for ending in ("", "_")
)
_CONTAINER_READS = frozenset(
    {"aten::__contains__", "aten::__getitem__", "aten::len", "aten::keys", "prim::unchecked_cast"}
)


def walk(block: Block, chain: Chain = ()) -> Iterator[tuple[Node, Chain]]:
    """Every node of a graph or block in order, those of nested blocks after the node that owns them."""
    for node in list(block.nodes()):
        yield node, chain
        for number, inner in enumerate(list(node.blocks())):
            yield from walk(inner, (*chain, (node, number)))


def marked_graph(archive: torch.jit.ScriptModule, device: torch.device, dtype: torch.dtype) -> Graph:
    """A flat graph `(self, *inputs) -> output` of the archive's forward, every module call marked; the archive is untouched."""
    graph = archive._c._get_method("forward").graph.copy()
    mark_calls(graph, archive)
    # What is left are calls of plain functions (torch.nn.functional) and of script classes.
    torch._C._jit_pass_inline(graph)
    retarget_constants(graph, device, dtype)
    _fold(graph, archive)
    if not any(True for _ in marks(graph)):
        mark_operators(graph)
    number_marks(graph)
    return graph


def mark_calls(graph: Graph, archive: torch.jit.ScriptModule) -> None:
    """Inlines every module call, in place, leaving a mark behind each.

    torch's inliner forgets all but the last step of a path such as `blocks.0`; doing it here, one call at a time, always has the
    whole chain of attributes from the archive down to the module that is called, and never rewrites the archive's methods.
    """
    found = True
    while found:
        found = False
        for node in list(graph.findAllNodes("prim::CallMethod")):
            path = _module_path(graph, node.inputsAt(0))
            if path is None:
                continue
            module = _submodule(archive, path)
            if module is None:
                continue  # An object of a script class; torch inlines its methods.
            found = True
            # A module interface hides the attributes of the module behind it; here the module is known.
            node.inputsAt(0).setType(module._type())
            graph.setInsertPoint(node)
            (value,) = graph.insertGraph(module._get_method(node.s("name")).graph, list(node.inputs()))
            if path and _FORWARD.fullmatch(node.s("name")):
                value = _mark(graph, value, path, before=node)
            node.output().replaceAllUsesWith(value)
            node.destroy()
    graph.setInsertPoint(graph.return_node())


def mark_operators(graph: Graph) -> None:
    """Marks every operator that returns a tensor, as `op.conv2d`, `op.relu`: all that a frozen archive still tells."""
    for node, _ in walk(graph):
        if (
            not node.kind().startswith("aten::")
            or node.outputsSize() != 1
            or node.output().type().kind() != "TensorType"
        ):
            continue
        mark_after(graph, node, "op." + node.kind().removeprefix("aten::").strip("_"))


def mark_after(graph: Graph, node: Node, path: str) -> None:
    """Marks what a node returns as what a module of this path would return."""
    value = node.output()
    mark = graph.create(_MARK, [value], 1)
    mark.s_("path", path)
    mark.output().setType(value.type())
    mark.insertAfter(node)
    record = graph.create(_RECORD, [mark.output()], 0)
    record.s_("path", path)
    record.insertAfter(mark)
    value.replaceAllUsesAfterNodeWith(record, mark.output())


def operators_marked(marked: Graph) -> Graph:
    """A copy of a marked graph in which operators inside modules have marks too, by the names they have in frozen archives."""
    graph = copied(marked)
    mark_operators(graph)
    number_marks(graph)
    return graph


def _mark(graph: Graph, value: Value, path: str, *, before: Node) -> Value:
    mark = graph.create(_MARK, [value], 1)
    mark.s_("path", path)
    mark.output().setType(value.type())
    mark.insertBefore(before)
    record = graph.create(_RECORD, [mark.output()], 0)
    record.s_("path", path)
    record.insertBefore(before)
    return mark.output()


def _module_path(graph: Graph, value: Value) -> str | None:
    """Dotted path of a module value, '' for the archive itself, None if it is not reached by attributes alone."""
    root, names = next(iter(graph.inputs())).unique(), []
    while value.unique() != root:
        if value.node().kind() != "prim::GetAttr":
            return None
        names.append(value.node().s("name"))
        value = value.node().input()
    return ".".join(reversed(names))


def _submodule(archive: torch.jit.ScriptModule, path: str) -> Any:
    """The module at a path; None if an object of a script class is on the way."""
    module = archive._c
    for name in path.split(".") if path else ():
        children: Any = torch._C.ModuleDict(module)  # The stubs know only a part of it.
        # Asked first: reading an object of a script class fails where its Python class was never imported.
        if not children.contains(name):
            return None
        module = module.getattr(name)
    return module


def _fold(graph: Graph, archive: torch.jit.ScriptModule) -> None:
    """Replaces settings such as `training` by their values, then drops the branches never taken and unrolls fixed loops.

    `torch.jit.freeze` would do so too, but also turns weights into constants, drops `detach` and merges equal calls.
    """
    writes = graph.findAllNodes("prim::SetAttr")
    written = {(_module_path(graph, node.inputsAt(0)), node.s("name")) for node in writes}
    for node in list(graph.findAllNodes("prim::GetAttr")):
        value, path = node.output(), _module_path(graph, node.inputsAt(0))
        module = None if path is None else _submodule(archive, path)
        if module is None or (path, node.s("name")) in written:
            continue
        kind = value.type().kind()
        read_only = kind in _CONTAINER_KINDS and all(use.user.kind() in _CONTAINER_READS for use in value.uses())
        if kind in _IMMUTABLE_KINDS or read_only:
            graph.setInsertPoint(node)
            try:
                constant = graph.insertConstant(module.getattr(node.s("name")))
            except RuntimeError:
                continue  # A tuple or list of something that cannot be a constant: it stays an attribute.
            value.replaceAllUsesWith(constant)
            node.destroy()
    graph.setInsertPoint(graph.return_node())
    _drop_dropouts(graph)
    torch._C._jit_pass_constant_propagation(graph)
    torch._C._jit_pass_constant_loop_unrolling(graph)  # type: ignore[attr-defined]  # The stub lacks it.
    torch._C._jit_pass_constant_propagation(graph)
    _drop_dropouts(graph)
    torch._C._jit_pass_dce(graph)


def _drop_dropouts(graph: Graph) -> None:
    """Puts the input of every dropout that does nothing in place of its output: they are one tensor, whatever the schema says.

    This must come before any pass that drops unread values, or writes into that tensor would be dropped as well.
    """
    for node, _ in list(walk(graph)):
        if node.kind() in _DROPOUTS and node.inputsAt(2).toIValue() is False:
            node.output().replaceAllUsesWith(node.inputsAt(0))
            node.destroy()


def marks(graph: Graph) -> Iterator[tuple[Node | None, Node, Chain]]:
    """Each call in order as (mark, record, blocks around it); the mark is None where the value became a constant."""
    for node, chain in list(walk(graph)):
        if node.kind() == _RECORD and node.hasAttribute("path"):
            mark = node.input().node()
            yield (mark if is_mark(mark) else None), node, chain


def number_marks(graph: Graph) -> None:
    """Numbers the calls of a graph in order, as whoever adds marks has to do again."""
    for number, (_, record, _chain) in enumerate(marks(graph)):
        record.i_("number", number)


def marked_outputs(node: Node) -> list[int]:
    """The numbers of the calls that return a node's output unchanged: modules from the inside out, then its own, if any."""
    modules: list[int] = []
    own: list[int] = []
    waiting = list(node.outputs())
    while waiting:
        users = [use.user for use in waiting.pop().uses()]
        for mark in users:
            if mark.kind() != _MARK or not mark.hasAttribute("path") or not _follows(mark, node):
                continue
            record = next(use.user for use in mark.output().uses() if use.user.kind() == _RECORD)
            (own if record.s("path").startswith("op.") else modules).append(record.i("number"))
            waiting.append(mark.output())
    return modules + own


def _follows(later: Node, earlier: Node) -> bool:
    """Whether nothing that could write to a value stands between two nodes."""
    node = later.prev()
    while node.kind() in {_MARK, _RECORD, "prim::Constant", "prim::GetAttr"}:
        node = node.prev()
    return bool(node == earlier)


def unmark(mark: Node | None, record: Node) -> None:
    """Takes one mark out of its graph: the value goes on as if the mark had never been."""
    record.destroy()
    if mark is not None:
        value = mark.output()
        value.replaceAllUsesWith(mark.input())
        mark.destroy()


def fused(graph: Graph) -> Graph:
    """A copy for a CPU whose convolutions are oneDNN's own, with weights laid out for it and the operators behind them fused.

    What is behind `torch.jit.optimize_for_inference`. Such operators have no derivative.
    """
    mine = copied(graph)
    torch._C._jit_pass_fuse_frozen_conv_add_relu(mine)
    torch._C._jit_pass_convert_frozen_ops_to_mkldnn(mine)
    torch._C._jit_pass_dce(mine)
    return mine


def is_mark(node: Node) -> bool:
    """Whether a node is the first of the two that mark a call."""
    return bool(node.kind() == _MARK and node.hasAttribute("path"))


def record_of(value: Value) -> Node | None:
    """The record behind the mark that gives out a value; None for other values."""
    users = (use.user for use in value.uses())
    return next((user for user in users if user.kind() == _RECORD and user.hasAttribute("path")), None)


def forget(graph: Graph, mark: Node, record: Node) -> None:
    """Leaves a call in the list, with its number, but without a value: nothing computes that any more."""
    (nothing,) = insert_constants(graph, [None], before=record)
    record.replaceInput(0, nothing)
    mark.output().replaceAllUsesWith(mark.input())
    mark.destroy()


def discard_unused(graph: Graph) -> None:
    """Removes nodes that have neither an effect nor a reader."""
    torch._C._jit_pass_dce(graph)


def copied(graph: Graph) -> Graph:
    """A copy to operate on. It shares tensors and keeps marks (paths kept by torch itself are lost in copies)."""
    return graph.copy()


def insert_constants(graph: Graph, values: Sequence[object], *, before: Node) -> list[Value]:
    """Constants of the graph, placed before a node."""
    graph.setInsertPoint(before)
    constants = [graph.insertConstant(value) for value in values]
    graph.setInsertPoint(graph.return_node())
    return constants


def compiled(name: str, graph: Graph) -> Callable[..., Any]:
    """A function out of a finished graph; call it inside `interpreted()`, with the archive's `_c` first."""
    graph.lint()
    function: Callable[..., Any] = torch._C._create_function_from_graph(name, graph)
    return function


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs compiled functions operator by operator, as eager mode would, without the profiling executor.

    That executor records the first calls, then rewrites the graph for the shapes it saw, and again for new ones: slow second
    calls, other kernels and hence other bits. The switch is thread-local in torch, so other threads keep their mode and it does
    not matter which thread loaded the program; it is read when a function is called.
    """
    before = torch._C._get_graph_executor_optimize()
    torch._C._set_graph_executor_optimize(False)  # noqa: FBT003 - the argument has no name
    try:
        yield
    finally:
        torch._C._set_graph_executor_optimize(before)


def receiver(archive: torch.jit.ScriptModule) -> Any:
    """What a compiled function takes as its first argument."""
    return archive._c


def code_of(archive: torch.jit.ScriptModule) -> str:
    """The source torch keeps of every method of every module, as text that is the same in every process.

    Class names are mangled by the order in which a process loads them, so that part is dropped.
    """
    texts = [
        f"{path}.{name}\n{module._c._get_method(name).code}"
        for path, module in archive.named_modules()
        for name in sorted(module._c._method_names())
    ]
    return re.sub(r"\.?___torch_mangle_\d+", "", "\n".join(texts))


def forward_arguments(archive: torch.jit.ScriptModule) -> list[Any]:
    """The forward's schema arguments without `self`: name, type, default. A compiled function knows no defaults."""
    return list(archive._c._get_method("forward").schema.arguments)[1:]


def written_arguments(node: Node) -> list[Value] | None:
    """The tensors an operator writes in place; None if that cannot be known (it calls something that is not inlined)."""
    kind = node.kind()
    if kind in {"prim::CallMethod", "prim::CallFunction", "prim::fork", "prim::awaitable", "prim::rpc_async"}:
        return None
    schema = node.schema()
    if schema == "(no schema)":
        return []
    arguments = torch._C.parse_schema(schema).arguments
    written = [value for value, argument in zip(node.inputs(), arguments, strict=False) if argument.is_write]
    # Putting a tensor in a list or dict writes the container; of lists, only the `_foreach_` operators write the tensors.
    return [value for value in written if value.type().kind() == "TensorType" or kind.startswith("aten::_foreach_")]


def tuple_of(values: Sequence[Value]) -> Any:
    """The type of a tuple of these values."""
    return torch._C.TupleType([value.type() for value in values])


def integer() -> Any:
    """The type `int`."""
    return torch._C.IntType.get()


def tensor() -> Any:
    """The type `Tensor`."""
    return torch._C.TensorType.get()


def optional(of_type: Any) -> Any:
    """The type of a value that may be None."""
    return torch._C.OptionalType(of_type)


def attribute_tensors(graph: Graph, archive: torch.jit.ScriptModule) -> dict[str, Tensor]:
    """Tensors the forward reads from the archive, by dotted name; also plain attributes that are no parameter or buffer."""
    found: dict[str, Tensor] = {}
    for node in graph.findAllNodes("prim::GetAttr"):
        path = _module_path(graph, node.inputsAt(0))
        module = None if path is None else _submodule(archive, path)
        if module is None or node.output().type().kind() not in {"TensorType", "OptionalType"}:
            continue
        value = module.getattr(node.s("name"))
        if isinstance(value, Tensor):
            found[f"{path}.{node.s('name')}" if path else node.s("name")] = value
    return found


def constant_of(graph: Graph, archive: torch.jit.ScriptModule, value: Value) -> tuple[bool, Any]:
    """Whether a value is the same in every forward because it is stored, and what it is."""
    node = value.node()
    while node.kind() in {"prim::unchecked_cast", "prim::unchecked_unwrap_optional", "aten::detach"}:
        node = node.inputsAt(0).node()
    if node.kind() == "prim::Constant":
        return True, node.output().toIValue()
    if node.kind() != "prim::GetAttr":
        return False, None
    path = _module_path(graph, node.inputsAt(0))
    module = None if path is None else _submodule(archive, path)
    writes = {
        (_module_path(graph, write.inputsAt(0)), write.s("name")) for write in graph.findAllNodes("prim::SetAttr")
    }
    if module is None or (path, node.s("name")) in writes:
        return False, None
    return True, module.getattr(node.s("name"))


def number_of(value: Value) -> float | None:
    """A constant number or truth value; None for anything else."""
    constant = value.toIValue() if value.node().kind() == "prim::Constant" else None
    return constant if isinstance(constant, (int, float)) else None


def constant_tensors(graph: Graph) -> dict[str, Tensor]:
    """Tensors held by the graph itself, as `constant.0`, `constant.1` in order: the weights of a frozen archive."""
    nodes = [node for node in graph.findAllNodes("prim::Constant") if _holds_tensor(node)]
    return {f"constant.{number}": node.t("value") for number, node in enumerate(nodes)}


def retarget_constants(graph: Graph, device: torch.device, dtype: torch.dtype) -> None:
    """Moves the graph's tensor constants and the devices a trace has baked in; `ScriptModule.to` reaches neither.

    Scalars (0-dim tensors) stay as they are: they mix with any device and dtype.
    """
    for node in graph.findAllNodes("prim::Constant"):
        if _holds_tensor(node):
            tensor = node.t("value").detach()
            if tensor.dim() > 0:
                tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            node.t_("value", tensor)
            node.output().setType(torch._C.TensorType.get())
        elif node.output().type().kind() == "DeviceObjType":
            graph.setInsertPoint(node)
            node.output().replaceAllUsesWith(graph.insertConstant(device))
    graph.setInsertPoint(graph.return_node())


def _holds_tensor(node: Node) -> bool:
    return bool(node.hasAttribute("value") and node.kindOf("value") == "t")
