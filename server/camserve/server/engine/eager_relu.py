"""Gates the ReLU modules of an eager model during one forward, and refuses a model whose ReLUs are not all modules.

`EagerProgram.capture` enters `gated_modules` around its forward. A module's backward can be changed by giving the module another
`forward`; a functional call (`F.relu`, `Tensor.clamp(min=0)`) has nothing that could be changed, and passing it over in silence
would give a map that is neither guided nor plain. Hence every operator of the forward is watched.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from camserve.server.engine.hooked_relu import Gate, activation_of, gate_of, gated, without_gates
from camserve.server.engine.hooks import Modules, forward_replaced
from camserve.server.engine.program import BackwardRule, ProgramKind
from camserve.server.errors import Reason, Unsupported

__all__ = ["gated_modules"]

_PLACES_IN_A_MESSAGE = 5


@contextlib.contextmanager
def gated_modules(root: nn.Module, modules: Modules, rule: BackwardRule) -> Iterator[tuple[Tensor, ...]]:
    """Gates every ReLU module for the forward in the body; afterwards all modules are as they were.

    Args:
        root: the whole model; refusals name its class for what happens in no submodule.
        modules: its submodules by path.
        rule: `GUIDED` or `DECONVNET`.

    Raises:
        Unsupported: after the body: a ReLU was called as a function, or there was none at all.
    """
    watch = _Watch(root, rule)
    with contextlib.ExitStack() as changes:
        for path, module in modules:
            changes.callback(module.register_forward_pre_hook(watch.opener(path, module)).remove)
            changes.callback(module.register_forward_hook(watch.closer(), always_call=True).remove)
            gate = _gate_of_module(module)
            if gate is not None:
                changes.enter_context(forward_replaced(module, watch.gate(gate)))
        changes.enter_context(watch)
        yield ()
    watch.check()


def _gate_of_module(module: nn.Module) -> Gate | None:
    """Which ReLU a module is. One that overrides `forward` is not trusted to be one; its functional call is found instead."""
    forward = type(module).forward
    if isinstance(module, nn.ReLU) and forward is nn.ReLU.forward:
        return Gate(is_in_place=module.inplace)
    is_clamp = isinstance(module, nn.Hardtanh) and forward is nn.Hardtanh.forward  # ReLU6 is one.
    if is_clamp and module.min_val == 0 and module.max_val == 6:
        return Gate(ceiling=6, is_in_place=bool(module.inplace))
    return None


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator of a forward below autograd, and in which module it is called."""

    def __init__(self, root: nn.Module, rule: BackwardRule) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rule = rule
        self._open: list[tuple[str, nn.Module]] = [("", root)]
        self._is_gating = False
        self._gated = 0
        self._functional: dict[str, str] = {}
        self._others: list[str] = []

    def opener(self, path: str, module: nn.Module) -> Callable[..., None]:
        def opened(_module: nn.Module, _args: Any) -> None:
            self._open.append((path, module))

        return opened

    def closer(self) -> Callable[..., None]:
        def closed(_module: nn.Module, _args: Any, _output: Any) -> None:
            self._open.pop()

        return closed

    def gate(self, gate: Gate) -> Callable[[Tensor], Tensor]:
        @functools.wraps(nn.ReLU.forward)
        def forward(value: Tensor) -> Tensor:
            self._is_gating, self._gated = True, self._gated + 1
            try:
                return gated(value, gate, self._rule)
            finally:
                self._is_gating = False

        return forward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._is_gating:
            is_floating = bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point()
            if is_floating and gate_of(func, args, kwargs or {}) is not None:
                path, module = self._open[-1]
                place = f"'{path}' ({type(module).__name__})" if path else f"the model itself ({type(module).__name__})"
                self._functional.setdefault(place, str(func))
            elif name := activation_of(func):
                self._others.append(name)
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        """Refuses what was seen, if it cannot be gated."""
        if self._functional:
            places = [f"{operator} in {place}" for place, operator in self._functional.items()]
            more = len(places) - _PLACES_IN_A_MESSAGE
            listed = ", ".join(places[:_PLACES_IN_A_MESSAGE]) + (f" and {more} more" if more > 0 else "")
            raise Unsupported(
                Reason.METHOD_UNSUPPORTED_BY_MODEL,
                f"rule '{self._rule}' reaches only the ReLU modules of an {ProgramKind.EAGER} program, and this one calls a ReLU "
                f"as a function: {listed}; make it an nn.ReLU, serve the model scripted or exported, where functional calls are "
                "gated too, or use vanilla-backprop or grad-cam",
                metadata={"rule": self._rule, "kind": ProgramKind.EAGER, "places": listed},
            )
        if not self._gated:
            raise without_gates(self._rule, ProgramKind.EAGER, self._others)
