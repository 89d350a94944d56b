"""Lists what each affine module of an eager model adds to its output.

Arrives: the modules by path and the calls of a forward. Leaves: a constant for each call. `EagerProgram.biases` is the caller.
Parameters that belong to a module of no known class may be added anywhere, so that such a model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, instancenorm
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from camserve.server.engine.hooked_biases import incomplete, norm_constant
from camserve.server.engine.hooks import Modules, tensors_of
from camserve.server.engine.program import Call, ProgramKind, TapName
from camserve.server.errors import Unsupported

__all__ = ["biases_of_modules"]

_AFFINE = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
# Not affine in their input, whether or not they have parameters.
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d, instancenorm._InstanceNorm)  # noqa: SLF001
# Named, since importing torchvision takes seconds and few models need it.
_FROZEN_NORM = "torchvision.ops.misc.FrozenBatchNorm2d"


class UsedTensors(TorchFunctionMode):
    """Sees which tensors a forward hands to PyTorch functions; a module's parameters may be used without calling the module.

    Attributes:
        addresses: `id`s of all that were handed over, for a result that is a tensor; those of parameters stay theirs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[int] = set()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if tensors_of(result):  # Not so for `parameter.dtype` and the like.
            self.addresses.update(map(id, tensors_of((args, kwargs))))
        return result


def biases_of_modules(
    root: nn.Module, modules: Modules, calls: Sequence[Call], used: Collection[int]
) -> dict[TapName, Tensor]:
    """Returns the constants, (c) each, in the order of the calls.

    Args:
        root: the whole model.
        modules: its submodules by path.
        calls: of one forward.
        used: `id`s of the tensors that this forward used.

    Raises:
        Unsupported: a layer's constant cannot be told.
    """
    called = {call.path for call in calls}
    for path, module in root.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and any(True for _ in module.parameters()):
            raise _refusal(path, module, "is compiled, and its insides cannot be tapped here")
        if path not in called and _own_tensors(module, used):
            how = "uses tensors of its own" if not path else "is never called, but others use its tensors"
            raise _refusal(path, module, f"{how} ({_own_tensors(module, used)}), and it cannot be told for what")
    found = {}
    known = dict(modules)
    for call in calls:
        module = known[call.path]
        constant = _constant_of(call.path, module, used)
        if constant is not None:
            if call.refusal or call.outputs:
                raise _refusal(call.path, module, "does not return one tensor")
            found[TapName(call.path, call.index)] = constant.detach().clone()
    return found


def _constant_of(path: str, module: nn.Module, used: Collection[int]) -> Tensor | None:
    """What a module itself adds, None for nothing; its children speak for themselves."""
    forward = type(module).forward
    if isinstance(module, _AFFINE) and any(forward is kind.forward for kind in _AFFINE):
        return module.bias if isinstance(module.bias, Tensor) else None
    if isinstance(module, batchnorm._BatchNorm) and forward is batchnorm._BatchNorm.forward:  # noqa: SLF001 - the common base.
        if module.running_mean is None or module.running_var is None:
            raise _refusal(path, module, "normalises by the statistics of the batch")
        return norm_constant(module.weight, module.bias, module.running_mean, module.running_var, module.eps)
    if f"{type(module).__module__}.{type(module).__qualname__}" == _FROZEN_NORM:
        tensors = [getattr(module, name) for name in ("weight", "bias", "running_mean", "running_var")]
        return norm_constant(tensors[0], tensors[1], tensors[2], tensors[3], float(module.eps))  # type: ignore[arg-type]
    if isinstance(module, _NORMS):
        raise _refusal(path, module, "divides by the spread of its input, so that what it adds is no constant")
    is_harmless = isinstance(
        module, (nn.PReLU, parametrize.ParametrizationList)
    )  # One scales, the other computes weights.
    if not is_harmless and _own_tensors(module, used):
        is_overridden = isinstance(module, (_AFFINE, batchnorm._BatchNorm))  # noqa: SLF001
        kind = "overrides the forward of its class" if is_overridden else "is of no known class"
        raise _refusal(path, module, f"{kind} and has tensors of its own ({_own_tensors(module, used)})")
    return None


def _own_tensors(module: nn.Module, used: Collection[int]) -> str:
    """Names of the floating parameters and buffers that a module itself holds and that were used."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return ", ".join(name for name, tensor in own if tensor.is_floating_point() and id(tensor) in used)


def _refusal(path: str, module: nn.Module, problem: str) -> Unsupported:
    place = f"layer '{path}' ({type(module).__name__})" if path else f"the model itself ({type(module).__name__})"
    return incomplete(ProgramKind.EAGER, place, problem)
