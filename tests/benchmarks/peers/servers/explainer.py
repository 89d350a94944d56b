"""What each peer does with a batch: ResNet-50 and pytorch-grad-cam, in the forms people use.

JPEG files arrive, one answer for each leaves as bytes. The three servers beside this file call it; it runs in the peers' own
environment, which has no camserve.

The forms:

- `predict`: the model alone under `torch.inference_mode`, for reference.
- `readme`: as pytorch-grad-cam's README shows it: a pretrained model as torchvision builds it, so that every parameter requires
  grad, one `GradCAM` object made once and called with batches, the outputs taken from `cam.outputs` without a second forward.
- `tuned`: the same with every parameter frozen but one bias right before the layer, the least that makes autograd start
  there: nothing below the layer is differentiated, and no gradient of a weight is computed.
- `tuned-channels-last`: `tuned` in the memory format that PyTorch's performance guide advises for convolutions.

There is no bfloat16 form: pytorch-grad-cam turns activations into numpy arrays, and numpy has no bfloat16 (TypeError).
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from pytorch_grad_cam import GradCAM
from torch import Tensor

FORMS = ("predict", "readme", "tuned", "tuned-channels-last")
SIZE = 224
TOP = 5
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def decode(jpeg: bytes) -> Tensor:
    """Returns the model's input, float32 (3 224 224): stretched by Pillow's bilinear filter, standardised as for ImageNet."""
    with Image.open(io.BytesIO(jpeg)) as file:
        picture = file.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    return (pixels.float().div_(255) - _MEAN) / _STD


class Explainer:
    """A ResNet-50 that predicts and, unless the form is `predict`, explains the predicted class at the last stage.

    Args:
        weights: of torchvision's resnet50, as `torch.save` wrote them.
        form: one of `FORMS`.
        threads: torch's.
        device: "cpu" or "cuda".
    """

    def __init__(self, weights: Path, form: str, threads: int, device: str) -> None:
        if form not in FORMS:
            raise ValueError(f"form {form!r} is not known; choose one of {', '.join(FORMS)}")
        torch.set_num_threads(threads)
        self._device = torch.device(device)
        self._memory_format = torch.channels_last if form == "tuned-channels-last" else torch.contiguous_format
        self._model = torchvision.models.resnet50()
        self._model.load_state_dict(torch.load(weights, weights_only=True))
        self._model.eval().to(self._device, memory_format=self._memory_format)
        layer = self._model.layer4[-1]
        if form.startswith("tuned"):
            self._model.requires_grad_(requires_grad=False)
            layer.bn3.bias.requires_grad_(requires_grad=True)
        self._cam = None if form == "predict" else GradCAM(model=self._model, target_layers=[layer])

    def explain(self, rows: list[Tensor]) -> list[bytes]:
        """Answers a batch: for each row a line of JSON, then the map's bytes (uint8, 0 to 255 from its least to its greatest)."""
        batch = torch.stack(rows).to(self._device, memory_format=self._memory_format)
        if self._cam is None:
            with torch.inference_mode():
                outputs = self._model(batch)
            maps = np.empty((len(rows), 0, 0), np.uint8)
        else:
            maps = np.uint8(255 * self._cam(input_tensor=batch, targets=None))
            outputs = self._cam.outputs
        probabilities, classes = outputs.detach().softmax(dim=1).topk(TOP)
        return [
            json.dumps({"classes": found, "probabilities": shares, "shape": values.shape}).encode()
            + b"\n"
            + values.tobytes()
            for found, shares, values in zip(classes.tolist(), probabilities.tolist(), maps, strict=True)
        ]
