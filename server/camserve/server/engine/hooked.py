"""The part of a program that eager models and unflattened exports share: both are an `nn.Module` that hooks can tap.

Arrives: a module that this program owns from now on. Leaves: outputs and activations, by the rules of `Program`. `eager.py`
and `export.py` construct it; the hooks themselves are in `hooks.py`, cuts in `rerun.py`.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from camserve.server.engine.digests import digest_tensors
from camserve.server.engine.hooks import Taps, addresses_of, hooks_on, plain_attention, recorded, tapped
from camserve.server.engine.program import ATTENTION, BackwardRule, Call, Capture, Cut, Digests, ProgramKind, TapName
from camserve.server.engine.rerun import RerunCut
from camserve.server.errors import CamserveError, NotFound, Reason, Unavailable, Unsupported

__all__ = ["HookedProgram"]

_NAMES_IN_A_MESSAGE = 12
_CUTS_KEPT = 32


class HookedProgram(abc.ABC):
    """A `Program` over an `nn.Module`: hooks during a forward, none before or after.

    Which calls a forward makes is seen by running one. `calls()` therefore needs a forward first, with the model's own input;
    later ones are expected to make the same calls, and one that calls a tapped layer another number of times is refused.

    Args:
        kind: named by refusals.
        module: moved to `device` and `dtype`, put in eval mode and frozen, all in place and for good.
        paths: the path each submodule is known by; several modules may share one.
        aliases: paths that name a module already in `paths`, with that module's path.
        code: what the code digest is over.
        device: where it runs.
        dtype: the floating dtype it computes in.
    """

    def __init__(
        self,
        *,
        kind: ProgramKind,
        module: nn.Module,
        paths: Sequence[tuple[str, nn.Module]],
        aliases: Mapping[str, str],
        code: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._kind = kind
        self._module = module.to(device=device, dtype=dtype).eval().requires_grad_(requires_grad=False)
        # TorchScript submodules take no hooks; they run, but none of their insides can be tapped here.
        self._modules = [(path, child) for path, child in paths if not isinstance(child, torch.jit.ScriptModule)]
        self._aliases = aliases
        self._owned = addresses_of(self._module)
        self._code = code
        self._device = device
        self._dtype = dtype
        self._calls: tuple[Call, ...] | None = None
        self._cuts: collections.OrderedDict[TapName, Cut] = collections.OrderedDict()
        self._folded: frozenset[str] = frozenset()

    @property
    def kind(self) -> ProgramKind:
        """The file's kind."""
        return self._kind

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype the program computes in."""
        return self._dtype

    def calls(self) -> Sequence[Call]:
        """Lists the calls of the first forward, in order of completion: children before their container.

        Raises:
            Unavailable: nothing has been run yet, so nobody knows.
        """
        if self._calls is None:
            raise Unavailable(
                Reason.MODEL_NOT_READY,
                f"the calls of this {self._kind} program are known after its first forward; run it once",
            )
        return self._calls

    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by name."""
        named = dict(self._module.named_parameters(remove_duplicate=False))
        return named | dict(self._module.named_buffers(remove_duplicate=False))

    @property
    def hooks(self) -> int:
        """How many hooks are on the modules right now."""
        return hooks_on(self._modules)

    def digests(self) -> Digests:
        """What the program is: its weights as held here (device and dtype applied), and its code."""
        return digest_tensors(self.tensors(), self._code)

    def keeps(self, tap: TapName) -> bool:
        """Whether a rewritten program still has what a tap of the original names."""
        try:
            return self._place(tap).path not in self._folded
        except CamserveError:
            return False

    def fused(self, _tap: TapName) -> Cut | None:
        """Python modules are run as they are: None."""
        return None

    def run(self, *inputs: Tensor) -> Any:
        """One forward without grad; the inputs are not changed."""
        with torch.no_grad(), plain_attention():
            if self._calls is not None:
                return self._module(*_own(inputs))
            with recorded(self._modules) as calls, self._watching_first_run():
                outputs = self._module(*_own(inputs))
        self._calls = tuple(calls)
        return outputs

    def _watching_first_run(self) -> contextlib.AbstractContextManager[object]:
        """What else is to be seen in the one forward that lists the calls."""
        return contextlib.nullcontext()

    def capture(
        self,
        taps: Sequence[TapName],
        *inputs: Tensor,
        differentiable: bool = True,
        rule: BackwardRule = BackwardRule.PLAIN,
    ) -> Capture:
        """One forward that keeps the value at each tap. The first one ever runs twice, to see which calls there are.

        Args:
            taps: what to keep.
            inputs: as for `run`; one that requires grad keeps its graph, and taps behind it are no leaves.
            differentiable: whether the values require grad and the outputs have a graph back to them.
            rule: how to differentiate.

        Raises:
            NotFound: a module, a call or an output of this name does not exist.
            Unsupported: it exists but cannot be tapped, or the name leaves open which of several tensors is meant; or the rule
                cannot be applied to this program.
        """
        if self._calls is None:
            self.run(*inputs)
        attentions = [tap for tap in taps if tap.path == ATTENTION.path]
        if attentions and rule is not BackwardRule.ATTENTION:
            raise Unsupported(
                Reason.LAYER_UNUSABLE,
                f"'{attentions[0]}' can be tapped under rule '{BackwardRule.ATTENTION}' only, not under '{rule}'",
                metadata={"layer": attentions[0], "rule": rule},
            )
        places = {tap: self._place(tap) for tap in taps if tap not in attentions}
        hooks = tapped(self._modules, set(places.values()), owned=self._owned)
        under = self._under(rule, len(inputs[0]) if inputs else 0)
        with torch.set_grad_enabled(differentiable), plain_attention(), under as probabilities, hooks as met:
            outputs = self._module(*_own(inputs))
        self._check_met(places, met)
        activations = {tap: met.values[place] for tap, place in places.items()}
        return Capture(outputs=outputs, activations=activations | _named(attentions, probabilities))

    @abc.abstractmethod
    def biases(self) -> Mapping[TapName, Tensor]:
        """What each affine layer adds to its output."""

    @abc.abstractmethod
    def _under(self, rule: BackwardRule, rows: int) -> contextlib.AbstractContextManager[Sequence[Tensor]]:
        """Makes the forward in its body follow a rule, and refuses at its end where the rule could not be applied.

        Returns:
            A context that gives the attention probabilities, under the rule that asks for them.
        """

    def cut(self, tap: TapName) -> Cut:
        """Cuts at one tap; see `rerun.py` for what the tail costs. Raises as `capture` does, and as `calls`."""
        self.calls()
        place = self._place(tap)
        # What a cut has learnt about its first run is worth keeping: it took several forwards.
        if place not in self._cuts:
            self._cuts[place] = self._cut_at(place)
            if len(self._cuts) > _CUTS_KEPT:
                self._cuts.popitem(last=False)
        self._cuts.move_to_end(place)
        return self._cuts[place]

    def _cut_at(self, place: TapName) -> Cut:
        return self._cut_by_rerun(place)

    def _cut_by_rerun(self, place: TapName) -> RerunCut:
        return RerunCut(self._kind, self._module, self._modules, place, owned=self._owned)

    def _check_met(self, places: Mapping[TapName, TapName], met: Taps) -> None:
        """Refuses a forward that made other calls than the first one: its 'last call' would be another place."""
        expected = collections.Counter(call.path for call in self.calls())
        for tap, place in places.items():
            seen = met.counts[tap.path]
            if place not in met.values or (tap.call is None and seen != expected[tap.path]):
                raise Unsupported(
                    Reason.LAYER_UNUSABLE,
                    f"layer '{tap}' was called {seen} times for this input and {expected[tap.path]} times before; "
                    f"name a call that always happens, such as '{tap.path}#0'",
                    metadata={"layer": tap},
                )

    def _place(self, tap: TapName) -> TapName:
        """Fills in the call index of a tap and checks that there is one tensor to be had at that place."""
        calls = [call for call in self.calls() if call.path == tap.path]
        if not calls:
            raise self._missing(tap)
        if tap.call is not None and tap.call >= len(calls):
            names = _listed([f"{call.path}#{call.index}" for call in calls])
            raise NotFound(
                Reason.LAYER_NOT_FOUND,
                f"layer '{tap}' does not exist: '{tap.path}' is called {len(calls)} times: {names}",
                metadata={"layer": tap},
            )
        call = calls[-1 if tap.call is None else tap.call]
        if call.refusal:
            raise Unsupported(
                Reason.LAYER_UNUSABLE, f"layer '{tap}' cannot be tapped: {call.refusal}", metadata={"layer": tap}
            )
        if (tap.output is None) != (not call.outputs):
            names = _listed([str(TapName(tap.path, tap.call, key)) for key in call.outputs])
            problem = (
                f"returns several tensors; name one: {names}" if names else f"returns one tensor; write '{tap.path}'"
            )
            error, reason = (Unsupported, Reason.LAYER_UNUSABLE) if names else (NotFound, Reason.LAYER_NOT_FOUND)
            raise error(reason, f"layer '{tap}' {problem}", metadata={"layer": tap})
        if tap.output is not None and tap.output not in call.outputs:
            names = _listed([str(TapName(tap.path, tap.call, key)) for key in call.outputs])
            raise NotFound(
                Reason.LAYER_NOT_FOUND, f"layer '{tap}' does not exist; known: {names}", metadata={"layer": tap}
            )
        return TapName(tap.path, call.index, tap.output)

    def _missing(self, tap: TapName) -> NotFound | Unsupported:
        if tap.path in self._aliases:
            known = self._aliases[tap.path]
            return Unsupported(
                Reason.LAYER_UNUSABLE,
                f"layer '{tap}' is the same module as '{known}', so its calls cannot be told apart by this name; "
                f"name a call of '{known}', such as '{known}#0'",
                metadata={"layer": tap},
            )
        if tap.path in dict(self._modules):
            return Unsupported(
                Reason.LAYER_UNUSABLE,
                f"layer '{tap}' exists but a forward never calls it: it only holds other layers, or is not used",
                metadata={"layer": tap},
            )
        tappable = list(dict.fromkeys(call.path for call in self.calls() if not call.refusal))
        near = difflib.get_close_matches(tap.path, tappable, n=5, cutoff=0.5)
        hint = f"near names: {_listed(near)}; " if near else ""
        return NotFound(
            Reason.LAYER_NOT_FOUND,
            f"layer '{tap}' does not exist; {hint}known layers: {_listed(sorted(tappable, key=lambda n: n.count('.')))}",
            metadata={"layer": tap},
        )


def _named(taps: Sequence[TapName], probabilities: Sequence[Tensor]) -> dict[TapName, Tensor]:
    """The attention probabilities that the taps ask for: all of them, or those of one call."""
    found = {}
    for tap in taps:
        if tap.output is not None or (tap.call is not None and tap.call >= len(probabilities)):
            names = _listed([f"{ATTENTION.path}#{call}" for call in range(len(probabilities))])
            raise NotFound(Reason.LAYER_NOT_FOUND, f"'{tap}' does not exist; known: {names}", metadata={"layer": tap})
        for call in range(len(probabilities)) if tap.call is None else [tap.call]:
            found[TapName(ATTENTION.path, call)] = probabilities[call]
    return found


def _own(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Copies the inputs, since a model may normalise them in place; next to a forward the copy costs nothing."""
    return [tensor.clone() for tensor in inputs]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_IN_A_MESSAGE
    return ", ".join(names[:_NAMES_IN_A_MESSAGE]) + (f" and {more} more" if more > 0 else "")
