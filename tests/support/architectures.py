"""Small networks of every kind of input and output, and a server for them.

They are served through factories `support.architectures:<name>`. Each is a few thousand weights from its own seed, and answers a
request within milliseconds.
"""

from __future__ import annotations

import collections
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from support.servers import settings
from torch import Tensor, nn

from camserve.client import Client
from camserve.server.background import BackgroundServer
from camserve.server.models.config import FactoryConfig, InputConfig, ModelConfig
from camserve.server.models.sources import ModelSource

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def eager(name: str, factory: str, input: InputConfig, **config: Any) -> ModelSource:  # noqa: A002 - the card's own word
    """A network of this file, built by its factory in the server."""
    built = FactoryConfig(
        name=f"support.architectures:{factory}", allowed_imports=("support.architectures",), random_seed=0
    )
    return ModelSource(name=name, version="1", path=None, config=ModelConfig(factory=built, input=input, **config))


def scripted(name: str, module: nn.Module, folder: Path, input: InputConfig, **config: Any) -> ModelSource:  # noqa: A002
    """The same as a TorchScript archive."""
    path = folder / f"{name}.pt"
    torch.jit.save(torch.jit.script(module.eval()), str(path))
    return ModelSource(name=name, version="1", path=path, config=ModelConfig(input=input, **config))


def exported(
    name: str,
    module: nn.Module,
    folder: Path,
    input: InputConfig,  # noqa: A002 - the card's own word
    examples: tuple[Tensor, ...],
    **config: Any,
) -> ModelSource:
    """The same as an archive of torch.export, for any number of rows."""
    path = folder / f"{name}.pt2"
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(module.eval(), examples, dynamic_shapes=tuple({0: rows} for _ in examples))
    torch.export.save(program, path)
    return ModelSource(name=name, version="1", path=path, config=ModelConfig(input=input, **config))


@contextlib.contextmanager
def served(make: Callable[[Path], list[ModelSource]], **changes: object) -> Iterator[Client]:
    """A client of a server for the models made in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        sources = make(Path(folder))
        with BackgroundServer(settings(**changes), sources) as server, Client(server.target, timeout=120) as client:
            yield client


def _seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


class Strided(nn.Module):
    """Two strided convolutions over 1, 2 or 3 axes of space, average pooling, one linear layer."""

    def __init__(self, axes: int, channels: int = 2, classes: int = 3) -> None:
        super().__init__()
        convolution = _CONVOLUTIONS[axes]
        self.stem = nn.Sequential(convolution(channels, 6, 3, stride=2, padding=1), _NORMS[axes](6), nn.ReLU())
        self.body = nn.Sequential(convolution(6, 8, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(b c *space) to (b classes)."""
        return self.head(self.body(self.stem(x)).flatten(2).mean(2))


def signal() -> nn.Module:
    """A `Strided` over time: (b 2 t) to (b 3)."""
    return _seeded(lambda: Strided(1))


def volume() -> nn.Module:
    """A `Strided` over depth, height and width: (b 2 d h w) to (b 3)."""
    return _seeded(lambda: Strided(3))


def flat_signal() -> nn.Module:
    """`signal` over pictures of one row: (b 2 1 t) to (b 3), with the same numbers."""
    return _flattened(Strided(2), signal(), axis=2)


def flat_volume() -> nn.Module:
    """`Strided` over pictures; `deep_picture` has the same numbers."""
    return _seeded(lambda: Strided(2))


def deep_picture() -> nn.Module:
    """`flat_volume` over volumes of one slice: (b 2 1 h w) to (b 3), with the same numbers."""
    return _flattened(Strided(3), flat_volume(), axis=2)


def _flattened(module: nn.Module, original: nn.Module, axis: int) -> nn.Module:
    """Gives a network of one axis more the weights of another: along that axis its kernels are 1 long and do not stride."""
    weights = original.state_dict()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            for part in ("kernel_size", "stride", "padding", "dilation"):
                whole = getattr(layer, part)
                setattr(layer, part, ((0 if part == "padding" else 1), *whole[1:]))
            layer._reversed_padding_repeated_twice = [0] * (2 * len(layer.padding))
            weights[f"{name}.weight"] = weights[f"{name}.weight"].unsqueeze(axis)
            layer.weight = nn.Parameter(torch.empty_like(weights[f"{name}.weight"]))
    module.load_state_dict(weights)
    return module.eval()


def _lively(module: nn.Module) -> nn.Module:
    """Weights large enough that scores depend on the input; libraries begin with small ones, and heads of zeros."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return module


def torchvision_vit() -> nn.Module:
    """Torchvision's ViT with a class token: 32 px, 4 x 4 patches, two blocks."""
    from torchvision.models import VisionTransformer  # noqa: PLC0415 - takes seconds to import

    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return _seeded(lambda: _lively(VisionTransformer(**sizes, num_classes=5)))


def _timm_vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    """Timm's ViT: 32 x 64 px, 4 x 8 patches, two blocks."""
    import timm  # noqa: PLC0415 - takes seconds to import

    sizes = {"img_size": (32, 64), "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2}
    return _seeded(lambda: _lively(timm.create_model(name, **sizes, num_classes=5, **options)))


def vit_without_prefix() -> nn.Module:
    """No token but the patches, whose mean is classified."""
    return _timm_vit(class_token=False, global_pool="avg")


def vit_with_class() -> nn.Module:
    """A class token before the patches."""
    return _timm_vit()


def vit_with_two() -> nn.Module:
    """A class and a distillation token before the patches."""
    return _timm_vit("deit_tiny_distilled_patch16_224")


def vit_with_registers() -> nn.Module:
    """A class token and four registers before the patches."""
    return _timm_vit(reg_tokens=4)


def swin() -> nn.Module:
    """Torchvision's Swin: (b h w c) inside, windows of 4 x 4, two stages."""
    from torchvision.models import SwinTransformer  # noqa: PLC0415 - takes seconds to import

    sizes = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": [4, 4]}
    return _seeded(lambda: _lively(SwinTransformer(**sizes, num_classes=5)))


class UNet(nn.Module):
    """Two steps down, two up, with skips; (b 3 h w) to (b classes h w) for sides that are multiples of 4."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.down1, self.down2, self.bottleneck = _block(3, 6), _block(6, 8), _block(8, 12)
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2.0, mode="nearest")
        self.up2, self.up1 = _block(20, 8), _block(14, 6)
        self.head = nn.Conv2d(6, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each pixel."""
        fine = self.down1(x)
        middle = self.down2(self.pool(fine))
        coarse = self.bottleneck(self.pool(middle))
        middle = self.up2(torch.cat([self.up(coarse), middle], dim=1))
        return self.head(self.up1(torch.cat([self.up(middle), fine], dim=1)))


def _block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def _balanced(module: UNet) -> nn.Module:
    """Moves the head's biases so that every class is predicted somewhere."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
        module.head.bias -= module.eval()(torch.rand(1, 3, 32, 48)).mean((0, 2, 3))
    return module


def unet() -> nn.Module:
    """A `UNet` of three classes."""
    return _seeded(lambda: _balanced(UNet(3)))


def binary_unet() -> nn.Module:
    """A `UNet` of one class, which is there or not."""
    return _seeded(lambda: _balanced(UNet(1)))


def detector() -> nn.Module:
    """Torchvision's Faster R-CNN over a body of two stages and a feature pyramid; inputs of 64 x 96 keep their size."""
    from torchvision.models.detection import FasterRCNN  # noqa: PLC0415 - takes seconds to import
    from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: PLC0415
    from torchvision.models.detection.backbone_utils import BackboneWithFPN  # noqa: PLC0415

    def build() -> nn.Module:
        stages = {"stem": _halving(3, 8), "stage1": _halving(8, 8), "stage2": _halving(8, 16)}
        backbone = BackboneWithFPN(
            nn.Sequential(collections.OrderedDict(stages)), {"stage1": "0", "stage2": "1"}, [8, 16], 16
        )
        module = FasterRCNN(
            backbone,
            num_classes=4,
            min_size=64,
            max_size=96,
            rpn_anchor_generator=AnchorGenerator(((16,), (24,), (40,)), ((0.5, 1.0, 2.0),) * 3),
            rpn_post_nms_top_n_test=20,
            box_score_thresh=0.2,
            box_detections_per_img=6,
            image_mean=[0.0, 0.0, 0.0],
            image_std=[1.0, 1.0, 1.0],
        )
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "rpn.head" in name or "box_predictor" in name:
                    parameter.mul_(4)
        return module

    return _seeded(build)


def _halving(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU())


class Joined(nn.Module):
    """A picture and a vector of four numbers: the vector scales the channels of the features, and adds to the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _halving(3, 6)
        self.body = _halving(6, 10)
        self.scale = nn.Linear(4, 10)
        self.head = nn.Linear(14, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """(b 3 h w) and (b 4) to (b 3)."""
        features = self.body(self.stem(x)) * self.scale(table).exp()[:, :, None, None]
        return self.head(torch.cat([features.mean((2, 3)), table], dim=1))


def joined() -> nn.Module:
    """A `Joined`."""
    return _seeded(Joined)


class Chosen(nn.Module):
    """A picture and a whole number, which says which of two heads is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _halving(3, 8)
        self.heads = nn.Embedding(2, 24)

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        """(b 3 h w) and (b) to (b 3)."""
        weights = self.heads(which).view(-1, 3, 8)
        return torch.einsum("bkc,bc->bk", weights, self.body(x).mean((2, 3)))


def chosen() -> nn.Module:
    """A `Chosen`."""
    return _seeded(Chosen)


class Answers(nn.Module):
    """One body and an answer of every kind: a dict of tensors and of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _halving(3, 6)
        self.body = _halving(6, 8)
        self.classes = nn.Linear(8, 4)
        self.values = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """(b 3 h w) to classes (b 4), a pair of values (b 2) and other classes (b 4), and a vector (b 8)."""
        features = self.body(self.stem(x)).mean((2, 3))
        logits = self.classes(features)
        return {"classes": logits, "pair": (self.values(features), -2 * logits), "vector": features}


def answers() -> nn.Module:
    """An `Answers`."""
    return _seeded(Answers)


class Reader(nn.Module):
    """A class of five at each of eight steps from left to right, from the columns of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_halving(3, 6), _halving(6, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 h w) to (b w/4 5)."""
        return self.head(self.body(x).mean(2).transpose(1, 2))


def reader() -> nn.Module:
    """A `Reader`."""
    return _seeded(Reader)


def pictures() -> nn.Module:
    """A `Strided` over pictures of any size: (b 3 h w) to (b 3)."""
    return _seeded(lambda: Strided(2, channels=3))


class FixedHead(nn.Module):
    """Reads every cell with a weight of its own, and so takes one size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_halving(3, 6), _halving(6, 8))
        self.head = nn.Linear(8 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(b 3 32 32) to (b 3)."""
        return self.head(self.body(x).flatten(1))


def fixed_head() -> nn.Module:
    """A `FixedHead`."""
    return _seeded(FixedHead)


def vit_of_any_size() -> nn.Module:
    """Timm's ViT that interpolates its positions."""
    return _timm_vit(dynamic_img_size=True)
