"""The pages for those who come from another server: their examples run as written, and what they say holds."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from click.testing import CliRunner
from PIL import Image
from support.nets import TinyNet
from torchvision.transforms import v2

from camserve.client import Client, Spec
from camserve.client.cli import main
from camserve.server.metrics import Metrics
from camserve.server.models.config import ModelConfig, read_config
from camserve.server.models.sources import scan_repository
from camserve.server.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("coming-from-torchserve.md", "coming-from-triton.md")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language on a page, in order."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def run(code: str, folder: Path, target: str = "") -> str:
    """Runs Python as a page has it, in a folder, against this server; what it prints."""
    done = subprocess.run(  # noqa: S603 - the page's own text
        [sys.executable, "-c", code.replace("localhost:50051", target)],
        cwd=folder,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout


@pytest.fixture
def torchserve_models(tmp_path) -> Path:
    """A repository filled as the page says from an archive of TorchServe."""
    (labels,) = (block for block in blocks("coming-from-torchserve.md", "python") if "part.mar" in block)
    (commands,) = blocks("coming-from-torchserve.md", "sh")
    add, serve = commands.splitlines()
    names = {"0": ["n01", "good"], "1": "scratch", "2": "spot", "3": "crack", "4": "stain"}
    with zipfile.ZipFile(tmp_path / "part.mar", "w") as archive, archive.open("part.pt", "w") as file:
        torch.jit.save(torch.jit.script(TinyNet(classes=5).eval()), file)
    with zipfile.ZipFile(tmp_path / "part.mar", "a") as archive:
        archive.writestr("index_to_name.json", json.dumps(names))
        archive.writestr("MAR-INF/MANIFEST.json", "{}")

    run(labels, tmp_path)
    with contextlib.chdir(tmp_path):
        done = CliRunner().invoke(main, add.split()[1:])

    assert 0 == done.exit_code, done.output
    assert "camserve serve --models models" == serve
    return tmp_path / "models"


def test_torchserve_card(torchserve_models, tmp_path):
    """The card on the page is the one that the page's command writes."""
    (card,) = blocks("coming-from-torchserve.md", "toml")
    (tmp_path / "model.toml").write_text(card, encoding="utf-8")

    (added,) = scan_repository(torchserve_models)
    written = read_config(tmp_path / "model.toml")

    assert (added.config.labels, added.config.recipe()) == (written.labels, written.recipe())
    assert added.config.output == written.output


def test_torchserve_maps_are_the_same(serve, torchserve_models, tmp_path, samples):
    """What the page's example answers is what TorchServe's handler for images computes, with captum, of the same picture."""
    server = serve(*scan_repository(torchserve_models))
    (example,) = (block for block in blocks("coming-from-torchserve.md", "python") if "integrated-gradients" in block)
    Image.open(samples[0]).convert("RGB").resize((320, 288)).save(tmp_path / "part.jpg")

    said = run(example, tmp_path, server.target).splitlines()
    with Client(server.target) as client:
        spec = Spec("integrated-gradients", target=0, steps=15, encoding="float32")
        ours = client.explain(tmp_path / "part.jpg", model="part", specs=[spec], top_k=5)
        plain = client.explain(tmp_path / "part.jpg", model="part", specs=[])

    # As TorchServe's ImageClassifier and VisionHandler have it.
    handler = v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    net = TinyNet(classes=5).eval()
    with Image.open(tmp_path / "part.jpg") as picture:
        row = handler(picture)[None]
    theirs = IntegratedGradients(net).attribute(row, target=0, n_steps=15)[0].detach().numpy()
    best = net(row).softmax(1)[0].sort(descending=True)

    names = ["good", "scratch", "spot", "crack", "stain"]

    assert [names[index] for index in best.indices] == [c.label for c in ours.prediction.classes]
    np.testing.assert_allclose([c.probability for c in ours.prediction.classes], best.values.detach(), rtol=1e-4)
    assert [c.probability for c in plain.prediction.classes] == [c.probability for c in ours.prediction.classes]
    np.testing.assert_allclose(ours.heatmaps[0].values.transpose(2, 0, 1), theirs, atol=1e-5 * np.abs(theirs).max())
    assert [c.label for c in ours.prediction.classes] == [line.split()[0] for line in said[:5]]
    assert "('h', 'w', 'c') (224, 224, 3)" == said[5]
    assert (tmp_path / "why.png").stat().st_size > 0


TRITON_CONFIG = """
platform: "pytorch_libtorch"
max_batch_size: 16
input [ { name: "INPUT__0" data_type: TYPE_FP32 dims: [ 3, 224, 224 ] } ]
output [ { name: "OUTPUT__0" data_type: TYPE_FP32 dims: [ 5 ] label_filename: "labels.txt" } ]
"""


def test_triton_repository_is_read_as_it_is(tmp_path):
    """A folder of Triton's with the page's model.toml beside config.pbtxt is a repository; one without a model file is told."""
    (card,) = blocks("coming-from-triton.md", "toml")
    (tmp_path / "part" / "1").mkdir(parents=True)
    (tmp_path / "part" / "config.pbtxt").write_text(TRITON_CONFIG, encoding="utf-8")
    (tmp_path / "part" / "model.toml").write_text(card, encoding="utf-8")
    (tmp_path / "part" / "labels.txt").write_text("good\nscratch\nspot\ncrack\nstain\n", encoding="utf-8")
    torch.jit.save(torch.jit.script(TinyNet(classes=5).eval()), str(tmp_path / "part" / "1" / "model.pt"))

    (source,) = scan_repository(tmp_path)

    assert ("part", "1", 16) == (source.name, source.version, source.config.max_batch)
    assert ("good", (3, 224, 224)) == (source.config.labels[0], source.config.recipe().shape)

    (tmp_path / "onnx" / "1").mkdir(parents=True)
    (tmp_path / "onnx" / "1" / "model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="onnx holds no version"):
        list(scan_repository(tmp_path))


def test_pictures_for_perf_analyzer(tmp_path, samples):
    """The page's example writes a picture as perf_analyzer sends it on: behind its length, as elements of BYTES are."""
    (example,) = (block for block in blocks("coming-from-triton.md", "python") if "part.json" in block)
    picture = samples[0].read_bytes()
    (tmp_path / "part.jpg").write_bytes(picture)

    run(example, tmp_path)

    (entry,) = json.loads((tmp_path / "part.json").read_text(encoding="utf-8"))["data"]
    assert len(picture).to_bytes(4, "little") + picture == base64.b64decode(entry["image"]["b64"])


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_what_there_is(page):
    """Every metric, and every setting in the right-hand column of a table, is one that there is."""
    text = (DOCS / page).read_text(encoding="utf-8")
    instruments = {
        getattr(item, "_name", "") + suffix for item in vars(Metrics()).values() for suffix in ("", "_total", "_info")
    }
    right = "\n".join(re.findall(r"^\|.*\| ([^|]*) \|$", text, re.MULTILINE))
    settings = set(re.findall(r"`((?:max|torch|batch|watch|unload|plan|metrics|drain)_\w+)`", right))

    named = {re.sub("_(sum|count|bucket)$", "", name) for name in re.findall(r"\b(camserve_\w+)", text)}

    assert set() == named - instruments
    assert set() == settings - set(Settings.model_fields) - set(ModelConfig.model_fields)
    assert settings
