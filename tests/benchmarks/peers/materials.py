"""Makes what every server is given: JPEG files of real pictures, and ResNet-50 with seeded random weights.

Run by `__main__.py` as a process of its own, so that the driver, which shares the machine with the servers, never holds torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from skimage import data

IMAGES = 64
SIZE = (640, 480)
_PICTURES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")


def write_images(folder: Path) -> None:
    """Writes crops of scikit-image's pictures, 640 by 480 pixels, quality 90; the same on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(getattr(data, name)()[..., :3]) for name in _PICTURES]
    for index in range(IMAGES):
        picture = pictures[index % len(pictures)]
        width = random.uniform(0.5, 1.0) * min(picture.width, picture.height * SIZE[0] / SIZE[1])
        height = width * SIZE[1] / SIZE[0]
        left, top = random.uniform(0, picture.width - width), random.uniform(0, picture.height - height)
        crop = picture.resize(SIZE, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        crop.save(folder / f"{index:02d}.jpg", quality=90)


def write_models(folder: Path, max_batch: int) -> None:
    """Writes the weights for the peers, and the same as a scripted archive in two repositories for camserve."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval()
    torch.save(model.state_dict(), folder / "resnet50.pth")
    archive = torch.jit.script(model)
    for precision in ("float32", "bfloat16"):
        version = folder / f"repository-{precision}" / "resnet50" / "1"
        version.mkdir(parents=True, exist_ok=True)
        archive.save(str(version / "model.pt"))
        card = f'default_layer = "layer4"\nprecision = "{precision}"\nmax_batch = {max_batch}\n\n[input]\nsize = [224, 224]\n'
        (version.parent / "model.toml").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_images(target / "images")
    write_models(target, int(sys.argv[2]))
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    sys.stdout.write(json.dumps({"torch": torch.__version__, "cuda": cuda}))
