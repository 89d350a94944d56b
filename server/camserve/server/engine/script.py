"""TorchScript archives, scripted or traced, as a `Program`: tapped and cut without the model's source.

Arrives: a file or stream that `torch.jit.load` reads. Leaves: outputs, activations and cuts by the rules of `Program`.
`models/` loads, `passes.py` and `probe.py` run. The graph work is in the `script_*.py` files beside this one.

An archive that was frozen before it was saved has neither module paths nor parameters left. Its taps are operators instead, in
order of execution: `op.conv2d#3` is the fourth convolution, `op.conv2d` the last one. The same names are used for an archive
whose forward calls no module. They stay the same as long as the file does.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from camserve.server.engine import script_graph as graphs
from camserve.server.engine.digests import digest_tensors
from camserve.server.engine.outreach import check_code, check_methods
from camserve.server.engine.program import ATTENTION, BackwardRule, Call, Capture, Digests, ProgramKind, TapName
from camserve.server.engine.script_attention import attention_graph, attentions_among
from camserve.server.engine.script_biases import biases_of
from camserve.server.engine.script_cut import SHARED, Host, ScriptCut
from camserve.server.engine.script_folded import rewritten_graph
from camserve.server.engine.script_form import FUNCTIONS_KEPT, Form, unusable
from camserve.server.engine.script_rules import ruled_graph
from camserve.server.engine.script_taps import Pick, cut_graphs
from camserve.server.engine.script_values import copied, is_same
from camserve.server.errors import CamserveError, NotFound, Reason, Unsupported

__all__ = ["ScriptCut", "ScriptProgram", "load_script"]

# How torch's operators complain of mixed dtypes; there is no exception type for it.
_DTYPES_DIFFER = re.compile(r"dtype|scalar type|should be the same|same type")


def load_script(source: Path | BinaryIO, *, device: torch.device, dtype: torch.dtype = torch.float32) -> ScriptProgram:
    """Loads a TorchScript archive, moves it to `device` and `dtype`, freezes its parameters and puts it in eval mode.

    Raises:
        NotFound: there is no such file.
        Unsupported: it is not a TorchScript archive that this version of torch can read, or its code reaches for files.
    """
    if isinstance(source, Path) and not source.is_file():
        raise NotFound(Reason.MODEL_NOT_FOUND, f"there is no file {source}", metadata={"file": source})
    try:
        check_code(source)
        archive = _archive(source, device)
    except (RuntimeError, ValueError) as error:
        raise Unsupported(
            Reason.MODEL_FAILED,
            f"this is not a TorchScript archive that torch {torch.__version__} can read ({_first_line(error)}); "
            "save one with torch.jit.save",
        ) from error
    check_methods(source, archive)
    return ScriptProgram(archive, device=device, dtype=dtype)


def _archive(source: Path | BinaryIO, device: torch.device) -> torch.jit.ScriptModule:
    """Reads the file; an archive that calls torchvision's operators, as detectors do, needs them registered first."""
    try:
        return _read(source, device)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        importlib.import_module("torchvision")  # Not always: it takes seconds, and few archives need it.
        if not isinstance(source, Path):
            source.seek(0)
        return _read(source, device)


def _read(source: Path | BinaryIO, device: torch.device) -> torch.jit.ScriptModule:
    name = str(source) if isinstance(source, Path) else source
    return torch.jit.load(name, map_location=device)  # type: ignore[no-untyped-call,no-any-return]


class ScriptProgram:
    """A `Program` over a loaded TorchScript archive, which it owns from now on.

    Outputs are those of the archive bit for bit. So that this holds for every batch size and every call, functions are
    interpreted operator by operator: nothing is specialised, fused or compiled again later.

    A model whose only argument is a list of images takes the tensors of `run` as that list, or one batch as the list of its rows.

    Args:
        archive: a loaded archive; moved, frozen and put in eval mode in place, and never changed afterwards.
        device: where it runs.
        dtype: the floating dtype it computes in.
        graph: a marked graph to run in place of the archive's own; see `rewritten`.
    """

    def __init__(
        self,
        archive: torch.jit.ScriptModule,
        *,
        device: torch.device,
        dtype: torch.dtype,
        graph: graphs.Graph | None = None,
    ) -> None:
        floating = {tensor.dtype for tensor in archive.state_dict().values() if tensor.is_floating_point()}
        self._archive = archive.to(device=device, dtype=dtype).eval()
        for parameter in self._archive.parameters():
            parameter.requires_grad = False
        self._device = device
        self._dtype = dtype
        self._is_converted = bool(floating - {dtype})
        self._arguments = graphs.forward_arguments(self._archive)
        self._code = graphs.code_of(self._archive)
        self._modules = frozenset(path for path, _ in self._archive.named_modules())
        self._plain = Form(graph or graphs.marked_graph(self._archive, device, dtype), self._modules)
        self._forms: dict[tuple[BackwardRule, bool], Form] = {}
        self._biases: Mapping[TapName, Tensor] | None = None
        self._copies_inputs = self._plain.writes_inputs
        self._cuts: collections.OrderedDict[tuple[bool, Pick], ScriptCut] = collections.OrderedDict()

    @property
    def kind(self) -> ProgramKind:
        """The file's kind."""
        return ProgramKind.TORCHSCRIPT

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype the program computes in."""
        return self._dtype

    def calls(self) -> Sequence[Call]:
        """Every module call of a forward, in order of completion; operators for an archive that has no module calls.

        Both branches of a condition that only the input decides are listed.
        """
        return self._plain.calls

    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters, buffers and other tensors of the archive by name; those baked into its code as `constant.0` and so on."""
        named: dict[str, Tensor] = dict(self._archive.named_parameters())
        named |= dict(self._archive.named_buffers())
        return (
            named
            | graphs.attribute_tensors(self._plain.graph, self._archive)
            | graphs.constant_tensors(self._plain.graph)
        )

    @property
    def hooks(self) -> int:
        """None ever: graphs are rewritten instead."""
        return 0

    def digests(self) -> Digests:
        """What the program is: its tensors as held here (device and dtype applied), and the code of all its methods."""
        return digest_tensors(self.tensors(), self._code)

    def run(self, *inputs: Tensor) -> Any:
        """One forward without grad; the inputs are not changed."""
        with torch.no_grad():
            return self._call(self._plain.plain, self._arranged(inputs))

    def rewritten(self, _inputs: Sequence[Tensor], *, channels_last: bool) -> ScriptProgram | None:
        """This program with batch normalisations folded into convolutions, and weights channels last if asked.

        It shares the archive, and holds the rewritten weights besides. None if there is nothing to rewrite.
        """
        graph, changed = rewritten_graph(self._plain.graph, self._archive, channels_last=channels_last)
        if not changed:
            return None
        return ScriptProgram(self._archive, device=self._device, dtype=self._dtype, graph=graph)

    def fused(self, tap: TapName) -> ScriptCut | None:
        """A cut at one tap whose front cannot be differentiated and is the faster for it; None where there is no such thing.

        Behind the cut nothing is fused, so that gradients reach back to it. Raises as `cut`.
        """
        if self._device.type != "cpu" or self._dtype is not torch.float32:
            return None  # Elsewhere torch fuses for shapes it has seen; other dtypes were not seen to gain.
        return self._cut_of(self._plain, tap, is_fused=True)

    def keeps(self, tap: TapName) -> bool:
        """Whether a rewritten program still has what a tap of the original names."""
        if tap.path.startswith("op.") and not any(call.path.startswith("op.") for call in self._plain.calls):
            return False  # Its operators are other ones.
        try:
            self._plain.pick(tap)
        except CamserveError:
            return False
        return True

    def capture(
        self,
        taps: Sequence[TapName],
        *inputs: Tensor,
        differentiable: bool = True,
        rule: BackwardRule = BackwardRule.PLAIN,
    ) -> Capture:
        """One forward that keeps the value at each tap. Inputs that require grad keep their graph, taps are then no leaves.

        Args:
            taps: what to keep; `ATTENTION` stands for every attention and comes as `@attention#0`, `@attention#1` and so on.
            inputs: as for `run`.
            differentiable: whether the values require grad and the outputs have a graph back to them.
            rule: how to differentiate.

        Raises:
            NotFound: a module, a call or an output of this name does not exist.
            Unsupported: it exists but cannot be tapped, or the name leaves open which of several tensors is meant; or the rule
                cannot be applied to this program.
        """
        form = self._form(rule, taps, inputs)
        picks = {
            tap: form.pick(tap) for asked in taps for tap in (form.every(asked) if asked == ATTENTION else [asked])
        }
        wanted = tuple(sorted(set(picks.values())))
        with torch.set_grad_enabled(differentiable):
            outputs, values = self._carefully_captured(form, wanted, inputs)
        activations = {}
        for tap, pick in picks.items():
            value = values[pick]
            if value is None:
                raise unusable(tap, f"this input takes a branch that does not call it; {form.others(tap)}")
            # The graph asks for a gradient at every tap; without grad mode nothing came of it but the flag.
            activations[tap] = value if differentiable else value.detach()
        return Capture(outputs=outputs, activations=activations)

    def cut(self, tap: TapName) -> ScriptCut:
        """Cuts at one tap; each half runs only its own part. Raises as `capture` does, and for a tap inside a branch."""
        form = self._form(BackwardRule.PLAIN, [tap])
        key = (form is self._plain, form.pick(tap))
        if key not in self._cuts:
            self._cuts[key] = self._cut_of(form, tap)
            if len(self._cuts) > FUNCTIONS_KEPT:
                self._cuts.popitem(last=False)
        self._cuts.move_to_end(key)
        return self._cuts[key]

    def _cut_of(self, form: Form, tap: TapName, *, is_fused: bool = False) -> ScriptCut:
        pick = form.pick(tap)
        if form.places[pick[0]].conditional:
            raise Unsupported(
                Reason.LAYER_UNUSABLE,
                f"layer '{tap}' is in a branch that depends on the input: it can be tapped, as gradient methods do, but the "
                "model cannot be cut there, as ablation does; choose a layer outside of the branch, or grad-cam",
                metadata={"layer": tap},
            )
        halves = cut_graphs(form.graph, pick, form.places)
        if is_fused:
            halves = dataclasses.replace(halves, front=graphs.fused(halves.front))
        return ScriptCut(Host(call=self._call, arranged=self._arranged, run=self.run), tap, halves)

    def biases(self) -> Mapping[TapName, Tensor]:
        """What each affine layer adds to its output, (c), in order of execution; see `script_biases.py` for what that covers.

        An operator whose output no module returns, and every one of a frozen archive, goes by a name such as `op.conv2d#3`.

        Raises:
            Unsupported: a layer's constant cannot be told; the message names the layer.
        """
        if self._biases is None:
            self._biases = biases_of(self._form_of(BackwardRule.PLAIN, names_operators=True), self._archive)
        return self._biases

    def _form(self, rule: BackwardRule, taps: Sequence[TapName], inputs: Sequence[Tensor] = ()) -> Form:
        """The form of a rule in which all these taps have names."""
        return self._form_of(rule, inputs, names_operators=any(tap.path.startswith("op.") for tap in taps))

    def _form_of(self, rule: BackwardRule, inputs: Sequence[Tensor] = (), *, names_operators: bool) -> Form:
        """The form of a rule; on wish one with named operators, which a frozen archive always has.

        What is attention can only be seen with inputs, the first time.
        """
        names_operators &= not any(call.path.startswith("op.") for call in self._plain.calls)
        if rule is BackwardRule.PLAIN and not names_operators:
            return self._plain
        if (rule, names_operators) not in self._forms:
            graph = graphs.operators_marked(self._plain.graph) if names_operators else self._plain.graph
            if rule is BackwardRule.ATTENTION:
                graph = attention_graph(graph, self._attentions(graph, inputs))
            elif rule is not BackwardRule.PLAIN:
                graph = ruled_graph(graph, rule)
            self._forms[rule, names_operators] = Form(graph, self._modules)
        return self._forms[rule, names_operators]

    def _attentions(self, marked: graphs.Graph, inputs: Sequence[Tensor]) -> list[int]:
        """Which of a graph's candidates are attentions, by one forward that captures them all."""
        form = Form(attention_graph(marked), self._modules)
        picks = {tap: form.pick(tap) for tap in form.every(ATTENTION)}
        with torch.no_grad():
            _, values = self._carefully_captured(form, tuple(sorted(picks.values())), inputs)
        return attentions_among([values[pick] for pick in picks.values()], len(inputs[0]))

    def _carefully_captured(
        self, form: Form, wanted: tuple[Pick, ...], inputs: Sequence[Tensor]
    ) -> tuple[Any, Mapping[Pick, Tensor | None]]:
        """One tapped forward; another with copies if the first shows that something is written which no schema tells of."""
        try:
            return self._captured(form, wanted, inputs)
        except _OverwrittenCapture:
            form.be_careful(wanted)
            # An input that requires grad must not be written to either.
            self._copies_inputs = True
        try:
            return self._captured(form, wanted, inputs)
        except _OverwrittenCapture as error:
            raise Unsupported(Reason.LAYER_UNUSABLE, SHARED) from error

    def _captured(
        self, form: Form, wanted: tuple[Pick, ...], inputs: Sequence[Tensor]
    ) -> tuple[Any, Mapping[Pick, Tensor | None]]:
        """One tapped forward, whose captures are known not to have been written to and to leave the outputs as they are."""
        outputs, values, versions = self._call(form.tapped(wanted), self._arranged(inputs))
        if any(
            value is not None and value._version != version  # noqa: SLF001 - torch's count of writes has no public name
            for value, version in zip(values, versions, strict=True)
        ):
            raise _OverwrittenCapture
        uncertain = [pick for pick in wanted if form.places[pick[0]].hazards.uncertain]
        if uncertain and wanted not in form.verified:
            with torch.no_grad():
                expected = self._call(form.plain, self._arranged(inputs))
            if not is_same(outputs, expected):
                raise Unsupported(Reason.LAYER_UNUSABLE, SHARED, metadata={"layer": form.places[uncertain[0][0]].path})
            form.verified.add(wanted)
        return outputs, dict(zip(wanted, values, strict=True))

    def _call(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        try:
            with graphs.interpreted():
                return function(graphs.receiver(self._archive), *arguments)
        except RuntimeError as error:
            raise self._explained(error, arguments) from error

    def _explained(self, error: RuntimeError, arguments: Sequence[Any]) -> Exception:
        """Says which failures are the archive's nature; all others stay what they are."""
        text = str(error)
        given = {
            argument.dtype for argument in arguments if isinstance(argument, Tensor) and argument.is_floating_point()
        }
        if self._is_converted and given <= {self._dtype} and _DTYPES_DIFFER.search(_last_line(error)):
            return Unsupported(
                Reason.MODEL_FAILED,
                f"this archive has dtypes fixed in its code and cannot compute in {self._dtype}: {_last_line(error)}",
                metadata={"dtype": self._dtype},
            )
        if "leaf Variable that requires grad" in text:
            return _OverwrittenCapture()
        if "can require gradients" in text:
            return Unsupported(Reason.LAYER_UNUSABLE, "a tapped layer returns integers, which have no gradient")
        return error

    def _arranged(self, inputs: Sequence[Tensor]) -> list[Any]:
        """The forward's arguments: inputs as given, a list where the model wants one, defaults for what is missing."""
        arguments: list[Any] = list(inputs)
        if (
            self._arguments
            and self._arguments[0].type.annotation_str == "List[Tensor]"
            and isinstance(inputs[0], Tensor)
        ):
            arguments = [list(inputs) if len(inputs) > 1 else list(inputs[0].unbind(0))]
        if self._copies_inputs:
            arguments = [copied(argument) for argument in arguments]
        missing = self._arguments[len(arguments) :]
        return [*arguments, *(argument.default_value for argument in missing if argument.has_default_value())]


class _OverwrittenCapture(Exception):
    """Something wrote into a captured value; never leaves this file."""


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]


def _last_line(error: Exception) -> str:
    return str(error).strip().rsplit("\n", maxsplit=1)[-1]
