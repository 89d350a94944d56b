"""Real architectures with random weights, for the slow comparison.

How each is built, in which form it is served, and how a library can look at the layer that our server takes by default.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torchvision
from contract.conformance.networks import Question
from torch import Tensor, nn

from camserve.server.models.config import FactoryConfig, InputConfig, ModelConfig
from camserve.server.models.sources import ModelSource

SEED = 3
Layout = Literal["channels first", "channels last", "tokens"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One network.

    Attributes:
        name: in torchvision or timm.
        library: which of them.
        form: how it is served.
        side: of its input, pixels.
        options: keyword arguments of its builder.
        layout: of its default layer.
        prefix: tokens before those of the grid.
        has_modules: whether all its nonlinearities are ReLU modules, so that libraries can guide them.
        is_fused: whether it has fused attention, which has no second derivative.
        is_flat: whether nothing but a mean stands behind its default layer, where pytorch-grad-cam's ShapleyCAM finds no graph.
        is_affine: whether all its constants are of Conv2d, BatchNorm2d and Linear, so that pytorch-grad-cam's FullGrad has them.
    """

    name: str
    library: Literal["torchvision", "timm"] = "torchvision"
    form: Literal["script", "trace", "export", "factory"] = "script"
    side: int = 96
    options: tuple[tuple[str, Any], ...] = ()
    layout: Layout = "channels first"
    prefix: int = 0
    has_modules: bool = False
    is_affine: bool = False
    is_fused: bool = False
    is_flat: bool = False

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        """The same weights as the server's factory makes from the seed."""
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            make: Callable[..., nn.Module] = (
                torchvision.models.get_model if self.library == "torchvision" else timm.create_model
            )
            net = make(self.name, **dict(self.options)).eval()
            for module in net.modules():
                # A head that begins as zeros, as torchvision's transformer's, has no gradient and would make every map empty.
                if isinstance(module, nn.Linear) and not bool(module.weight.any()):
                    module.weight.data.normal_(0, 0.1)
            return net

    def image(self) -> Tensor:
        """Noise (1 3 h w)."""
        return torch.randn(1, 3, self.side, self.side, generator=torch.Generator().manual_seed(1))

    def source(self, net: nn.Module, folder: Path) -> ModelSource:
        """The model as it is served."""
        size = InputConfig(size=(self.side, self.side))
        if self.form == "factory":
            factory = FactoryConfig(name=f"{self.library}:{self.name}", random_seed=SEED)
            return ModelSource(name=self.name, version="1", path=None, config=ModelConfig(factory=factory, input=size))
        images = self.image().repeat(2, 1, 1, 1)
        path = folder / f"{self.name}.{'pt2' if self.form == 'export' else 'pt'}"
        if self.form == "export":
            batch = {0: torch.export.Dim("batch", min=1, max=64)}
            torch.export.save(torch.export.export(copy.deepcopy(net), (images,), dynamic_shapes=(batch,)), path)
        else:
            with torch.no_grad():
                archive = torch.jit.script(net) if self.form == "script" else torch.jit.trace(net, images)
            torch.jit.save(archive, str(path))
        return ModelSource(name=self.name, version="1", path=path, config=ModelConfig(input=size))

    def question(self, net: nn.Module, layer: str, class_index: int) -> Question:
        """The network with the layer's output as a grid of channels that nothing behind it can overwrite.

        Libraries then need no transform of their own, and their trouble with in-place operations, which `test_oracles.py` names,
        stays out of this comparison.
        """
        shown = copy.deepcopy(net)
        for module in shown.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # Captum cannot hook it otherwise.
        parent, _, name = layer.rpartition(".")
        setattr(shown.get_submodule(parent), name, Seen(shown.get_submodule(layer), self.layout, self.prefix))
        return Question(net=shown, image=self.image(), layers=(f"{layer}.seen",), class_index=class_index)


class Seen(nn.Module):
    """A layer whose output passes through `seen` as (b c h w)."""

    def __init__(self, layer: nn.Module, layout: Layout, prefix: int) -> None:
        super().__init__()
        self.layer = layer
        self.seen = nn.Identity()
        self._layout = layout
        self._prefix = prefix

    def forward(self, *inputs: Any, **more: Any) -> Tensor:
        """As the layer."""
        output: Tensor = self.layer(*inputs, **more)
        match self._layout:
            case "channels first":
                # The identity must not hand on the tensor itself: what stands behind may write to it.
                return self.seen(output.clone()).clone()
            case "channels last":
                return self.seen(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).clone()
            case "tokens":
                side = round((output.shape[1] - self._prefix) ** 0.5)
                grid = output[:, self._prefix :].transpose(1, 2).unflatten(2, (side, side))
                tokens = self.seen(grid).flatten(2).transpose(1, 2)
                return torch.cat([output[:, : self._prefix], tokens], dim=1)


def _torchvision(name: str, **more: Any) -> Architecture:
    return Architecture(name=name, **{"options": (("num_classes", 10),), **more})


_NO_AUXILIARY = (("num_classes", 10), ("aux_logits", False), ("init_weights", False))

ARCHITECTURES = (
    _torchvision("resnet18", is_affine=True),
    _torchvision("resnet50", form="export", is_affine=True),
    _torchvision("vgg11_bn", has_modules=True, is_affine=True),
    _torchvision("densenet121", is_affine=True),
    _torchvision("mobilenet_v3_small"),
    _torchvision("efficientnet_b0", form="export"),
    _torchvision("squeezenet1_1", has_modules=True, is_affine=True, is_flat=True),
    _torchvision("googlenet", form="trace", is_affine=True, options=_NO_AUXILIARY),
    _torchvision("shufflenet_v2_x0_5", is_affine=True),
    _torchvision("convnext_tiny", form="trace"),
    _torchvision("regnet_y_400mf", form="factory", options=()),
    _torchvision("vit_b_16", side=224, layout="tokens", prefix=1, is_fused=True),
    _torchvision("swin_t", side=224, form="export"),
    Architecture(name="resnetv2_50", library="timm", form="trace"),
    Architecture(
        name="vit_tiny_patch16_224", library="timm", form="factory", side=224, layout="tokens", prefix=1, is_fused=True
    ),
    Architecture(name="repvgg_a0", library="timm", form="factory", is_affine=True),
)
