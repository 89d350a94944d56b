"""Eager models: an `nn.Module` in this process, built by a factory or handed over by its owner, becomes a `Program`.

Taps are forward hooks that live for one forward; calls are known after the first one. `factories.py` builds the modules.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from camserve.server.engine.eager_attention import watched_attention
from camserve.server.engine.eager_biases import UsedTensors, biases_of_modules
from camserve.server.engine.eager_folded import rewritten_module
from camserve.server.engine.eager_relu import gated_modules
from camserve.server.engine.hooked import HookedProgram
from camserve.server.engine.hooked_relu import GATES
from camserve.server.engine.program import BackwardRule, ProgramKind, TapName

__all__ = ["EagerProgram"]


class EagerProgram(HookedProgram):
    """A `Program` over an eager module.

    Constructing it is the one time the module changes: it is moved to `device` and `dtype`, put in eval mode, and its
    parameters are frozen with `requires_grad_(False)`, in place and for good; those made under inference mode are replaced by
    copies. Whoever wants to train it on passes a copy.
    Afterwards it is left as it was by every call, also by one that raises: no hooks, no `.grad`, no changed buffer.

    A module that is registered under two paths is known by the first; the other is refused. `cut` resumes by running the
    model again with what the front remembered (see `rerun.py`): exact, at the price of holding the outputs of the modules
    before the tap.

    Args:
        module: takes tensors, returns a tensor or a structure of tensors.
        device: where it runs.
        dtype: the floating dtype it computes in.
        folded: paths of layers whose own value is gone; see `rewritten`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        folded: frozenset[str] = frozenset(),
    ) -> None:
        self._used = UsedTensors()
        _leave_inference_mode(module)
        paths = [(path, child) for path, child in module.named_modules() if path]
        first = {id(child): path for path, child in paths}
        everything = ((path, first.get(id(child), "")) for path, child in module.named_modules(remove_duplicate=False))
        super().__init__(
            kind=ProgramKind.EAGER,
            module=module,
            paths=paths,
            aliases={path: known for path, known in everything if path != known and known},
            code=_code_of(module),
            device=torch.device(device),
            dtype=dtype,
        )
        self._folded = folded

    def rewritten(self, inputs: Sequence[Tensor], *, channels_last: bool) -> EagerProgram | None:
        """A copy with batch normalisations folded into convolutions, and weights channels last if asked; with weights of its own.

        Args:
            inputs: of one forward, which shows what can be folded.
            channels_last: whether to change the layout too.

        Returns:
            None if there is nothing to rewrite.
        """
        module, folded = rewritten_module(self._module, inputs, channels_last=channels_last)
        if not folded and not (channels_last and any(isinstance(child, nn.Conv2d) for child in module.modules())):
            return None
        other = EagerProgram(module, device=self.device, dtype=self.dtype, folded=folded)
        other.run(*inputs)  # Shows its calls, which are those of this one.
        return other

    def biases(self) -> dict[TapName, Tensor]:
        """What each affine layer adds, by class of module. Raises as `Program.biases`, and as `calls`."""
        return biases_of_modules(self._module, self._modules, self.calls(), self._used.addresses)

    def _watching_first_run(self) -> contextlib.AbstractContextManager[object]:
        return self._used

    def _under(self, rule: BackwardRule, rows: int) -> contextlib.AbstractContextManager[Sequence[Tensor]]:
        if rule in GATES:
            return gated_modules(self._module, self._modules, rule)
        if rule is BackwardRule.ATTENTION:
            return watched_attention(rows)
        return contextlib.nullcontext(())


def _leave_inference_mode(module: nn.Module) -> None:
    """Puts copies in the place of tensors that were made under `torch.inference_mode`: autograd refuses to keep those."""
    copies: dict[int, Tensor] = {}
    for child in module.modules():
        own = [*child.named_parameters(recurse=False, remove_duplicate=False), *child.named_buffers(recurse=False)]
        for name, tensor in own:
            if tensor.is_inference():
                if id(tensor) not in copies:
                    copy = tensor.clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    copies[id(tensor)] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
                setattr(child, name, copies[id(tensor)])


def _code_of(module: nn.Module) -> str:
    """The module tree and the source of every class in it; classes without source count by name."""
    sources = {}
    for child in module.modules():
        kind = type(child)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name not in sources:
            try:
                sources[name] = inspect.getsource(kind)
            except (OSError, TypeError):
                sources[name] = ""
    return "\n".join([repr(module), *(f"{name}\n{sources[name]}" for name in sorted(sources))])
