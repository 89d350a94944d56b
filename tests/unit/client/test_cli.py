from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from camserve.client import cli
from camserve.v1 import explanation_service_pb2, spec_pb2
from tests.unit.client.conftest import VALUES, Peer, status


def _run(*arguments: str, peer: Peer | None = None, stdin: bytes | None = None) -> Result:
    server = ["--server", peer.target] if peer else []
    return CliRunner().invoke(cli.main, [*arguments, *server], input=stdin)


def _lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def _written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def photos(tmp_path: Path, png: bytes) -> Path:
    """A folder with two good images, one in a sub-folder, and a broken one between."""
    for name, data in (("a.png", png), ("b.png", b"broken"), ("deep/a.png", png)):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "photos"


def test_each_image_gives_a_line_of_json_and_an_overlay_for_each_method(
    peer: Peer, photos: Path, tmp_path: Path
) -> None:
    """A broken file does not stop the others, and shows in the exit status."""
    out = tmp_path / "maps"

    result = _run("explain", str(photos), "-m", "grad-cam", "-m", "layercam", "--out", str(out), peer=peer)

    assert 1 == result.exit_code
    first, broken, deep = _lines(result)
    assert ["a.png", "b.png", "deep/a.png"] == [
        Path(line["source"]).relative_to(photos).as_posix() for line in (first, broken, deep)
    ]
    assert "scratch" == first["prediction"]["classes"][0]["label"]
    assert ["grad-cam", "layercam"] == [item["method"] for item in deep["heatmaps"]]
    assert "IMAGE_UNDECODABLE" == broken["error"]["reason"]
    assert ["a.grad-cam.png", "a.layercam.png", "deep/a.grad-cam.png", "deep/a.layercam.png"] == _written(out)


def test_top_k_and_raw_write_one_map_for_each_rank_with_its_values(peer: Peer, photos: Path, tmp_path: Path) -> None:
    """The values are exact: float32 is asked for."""
    out = tmp_path / "maps"

    result = _run("explain", str(photos / "a.png"), "--top-k", "2", "--raw", "--out", str(out), peer=peer)

    assert 0 == result.exit_code, result.output
    assert ["a.grad-cam.1.npy", "a.grad-cam.1.png", "a.grad-cam.2.npy", "a.grad-cam.2.png"] == _written(out)
    assert VALUES.tolist() == np.load(out / "a.grad-cam.2.npy").tolist()
    assert spec_pb2.ENCODING_FLOAT32 == peer.requests[0].specs[0].encoding


def test_target_and_layers_reach_every_spec(peer: Peer, photos: Path) -> None:
    """Digits are a class index, anything else a label."""
    _run("explain", str(photos / "a.png"), "--target", "1", "--layer", "layer1", "--layer", "layer2", peer=peer)
    _run("explain", str(photos / "a.png"), "--target", "good", peer=peer)

    by_index, by_label = (request.specs[0] for request in peer.requests)
    assert (1, ["layer1", "layer2"]) == (by_index.target.class_index, list(by_index.layers))
    assert "good" == by_label.target.class_label


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--target", "scratch", "--against", "0"), {"target": {"difference": {"class_index": 1}}}),
        (("--polarity", "against"), {"target": {"predicted": {}, "polarity": "POLARITY_AGAINST"}}),
        (("--score", "rest"), {"target": {"predicted": {}, "score": "SCORE_REST"}}),
        (("--phrase", "a scratch"), {"target": {"text": "a scratch"}}),
        (
            ("--box", "1,2,3,4", "--target", "good"),
            {
                "target": {
                    "region": {
                        "class_index": 0,
                        "box": {"left_pixels": 1, "top_pixels": 2, "width_pixels": 3, "height_pixels": 4},
                    }
                }
            },
        ),
        (("--point", "1.5,2"), {"target": {"region": {"point": {"x_pixels": 1.5, "y_pixels": 2}}}}),
        (("--regions", "0.5"), {"regions": {"threshold": 0.5}}),
        (("--saliency", "gray"), {"saliency": "SALIENCY_GRAY"}),
        (("--augment", "--eigen-smooth"), {"smoothing": {"augmentation": True, "eigen": True}}),
        (
            ("--seed", "7", "--samples", "8", "--channels", "9", "--similar-classes", "3", "--allow-partial"),
            {"parameters": {"seed": 7, "samples": 8, "channels": 9, "similar_classes": 3, "allow_partial": True}},
        ),
    ],
)
def test_options_reach_the_spec(
    peer: Peer, photos: Path, arguments: tuple[str, ...], expected: dict[str, object]
) -> None:
    """Class names are looked up on the card where the contract takes an index."""
    result = _run("explain", str(photos / "a.png"), *arguments, peer=peer)

    assert 0 == result.exit_code, result.output
    message = spec_pb2.Spec(method="METHOD_GRAD_CAM")
    message.target.predicted.SetInParent()
    message.MergeFrom(spec_pb2.Spec(**expected))  # type: ignore[arg-type]
    assert message == peer.requests[0].specs[0]


def test_an_image_can_be_compared_with(peer: Peer, photos: Path, png: bytes) -> None:
    """The other one is sent with each request."""
    _run("explain", str(photos / "deep"), "--similar", str(photos / "a.png"), peer=peer)

    assert png == peer.requests[0].specs[0].target.embedding.image.data


def test_options_of_the_request_reach_it(peer: Peer, photos: Path, tmp_path: Path) -> None:
    """Where to look, how urgently, and what else the model takes."""
    np.save(tmp_path / "mask.npy", np.ones((1, 4), np.float32))

    result = _run(
        "explain", str(photos / "a.png"), "--roi", "1,2,3,4", "--lane", "bulk", "--extra", f"mask={tmp_path / 'mask.npy'}",
        peer=peer,
    )  # fmt: skip

    assert 0 == result.exit_code, result.output
    (request,) = peer.requests
    assert explanation_service_pb2.LANE_BULK == request.lane
    assert (1, 2, 3, 4) == tuple(value for _, value in request.region_of_interest.ListFields())
    assert [1, 4] == list(request.extra_inputs["mask"].shape)


def test_a_sweep_explains_each_stage_of_the_model(peer: Peer, photos: Path, tmp_path: Path) -> None:
    """Each with each method, in files that tell the layer."""
    out = tmp_path / "maps"

    result = _run(
        "explain", str(photos / "a.png"), "--sweep", "-m", "cam", "-m", "grad-cam", "--out", str(out), peer=peer
    )

    assert 0 == result.exit_code, result.output
    assert [(1, ["layer1"]), (1, ["layer2"]), (2, ["layer1"]), (2, ["layer2"])] == [
        (spec.method, list(spec.layers)) for spec in peer.requests[0].specs
    ]
    assert ["a.cam.layer1.png", "a.cam.layer2.png", "a.grad-cam.layer1.png", "a.grad-cam.layer2.png"] == _written(out)


def test_regions_and_target_details_are_printed(peer: Peer, photos: Path) -> None:
    """As JSON, with null for what a map is not about."""
    result = _run("explain", str(photos / "a.png"), "--regions", "0.5", peer=peer)

    (item,) = _lines(result)[0]["heatmaps"]
    assert ([], 1.0, "for", None) == (
        item["regions"], item["completed"], item["target"]["polarity"], item["target"]["other_class_index"],
    )  # fmt: skip


def test_an_image_may_come_from_standard_input(peer: Peer, png: bytes) -> None:
    """A dash means that; the model may be left out when there is only one."""
    result = _run("explain", "-", peer=peer, stdin=png)

    assert 0 == result.exit_code, result.output
    assert ["-"] == [line["source"] for line in _lines(result)]
    assert "surface" == peer.requests[0].model


def test_a_spec_that_failed_shows_in_the_exit_status(peer: Peer, photos: Path) -> None:
    """The prediction is still told."""
    result = _run("explain", str(photos / "a.png"), "--layer", "flat", peer=peer)

    assert 1 == result.exit_code
    assert ["LAYER_UNUSABLE"] == [error["reason"] for error in _lines(result)[0]["errors"]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("-m", "gradcm"), "did you mean 'grad-cam'?"),
        (("--raw",), "add --out DIR"),
        (("--target", "1", "--top-k", "2"), "contradict each other"),
        (("--against", "good"), "add --target CLASS"),
        (("--target", "1", "--against", "0", "--box", "1,2,3,4"), "contradict each other"),
        (("--box", "1,2,3,4", "--point", "1,2"), "--box and --point contradict each other"),
        (("--phrase", "a scratch", "--target", "1"), "an embedding has no classes"),
        (("--sweep", "--layer", "layer1"), "--sweep and --layer contradict each other"),
        (("--box", "1,2,3"), "'1,2,3' is not LEFT,TOP,WIDTH,HEIGHT in pixels"),
        (("--point", "1,y"), "'1,y' is not X,Y in pixels"),
        (("--regions", "0"), "--regions"),
        (("--target", "bus", "--against", "good"), "'bus' is not one label of surface: good, scratch"),
        (("--extra", "mask"), "give NAME=FILE.npy"),
        (("--lane", "fast"), "bulk"),
        (("--top-k", "0"), "x>=1"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_sent(
    peer: Peer, photos: Path, arguments: tuple[str, ...], told: str
) -> None:
    """Exit status 2 is click's for usage."""
    result = _run("explain", str(photos / "a.png"), *arguments, peer=peer)

    assert 2 == result.exit_code
    assert told in result.output
    assert [] == peer.requests


def test_a_folder_without_images_is_wrong_usage(tmp_path: Path) -> None:
    """Doing nothing, successfully, would hide a mistake."""
    result = _run("explain", str(tmp_path))

    assert 2 == result.exit_code
    assert "no images in" in result.output


@pytest.mark.parametrize("command", [("models",), ("explain", "{image}")])
def test_no_server_is_told_in_one_line(photos: Path, command: tuple[str, ...]) -> None:
    """With what to do."""
    arguments = [part.format(image=photos / "a.png") for part in command]

    result = _run(*arguments, "--server", "localhost:1")

    assert 1 == result.exit_code
    assert result.stderr.startswith("Error: no camserve at localhost:1 (")
    assert result.stderr.endswith("); start one with `camserve serve`\n")
    assert 1 == result.stderr.count("\n")


def test_a_key_in_place_of_an_authority_is_wrong_usage(tmp_path: Path) -> None:
    """Rather than a server that seems to be away."""
    path = tmp_path / "ca.key"
    path.write_text("-----BEGIN PRIVATE KEY-----\n")

    result = _run("models", "--ca", str(path))

    assert 2 == result.exit_code
    assert "ca.key holds no PEM certificate" in result.stderr


def test_an_unknown_model_is_told_once(peer: Peer, photos: Path) -> None:
    """Not again for each image."""
    result = _run("explain", str(photos), "--model", "other", peer=peer)

    assert 1 == result.exit_code
    assert "Error: MODEL_NOT_FOUND: no model 'other'; there are surface\n" == result.stderr


def test_models_are_listed_as_a_table_or_as_json(peer: Peer) -> None:
    """Failed ones with the reason."""
    table, as_json = _run("models", peer=peer), _run("models", "--json", peer=peer)

    assert all(word in table.output for word in ("surface", "ready", "broken", "failed", "no such file"))
    assert [("broken", "failed"), ("surface", "ready")] == [
        (item["name"], item["state"]) for item in json.loads(as_json.output)
    ]


def test_a_card_shows_layers_and_methods(peer: Peer) -> None:
    """What can be asked of the model, and why not."""
    shown, as_json = _run("models", "surface", peer=peer), _run("models", "surface", "--json", peer=peer)

    for told in (
        "layer2 (default)", "no spatial extent", "grad-cam", "two linear layers follow", "made for tests", "classification",
        "mask: 1 x 4 float32", "layer1, layer2", "a scratch",
    ):  # fmt: skip
        assert told in shown.output
    assert ["good", "scratch"] == json.loads(as_json.output)["labels"]


def test_a_draining_server_is_not_taken_for_none(peer: Peer) -> None:
    """What the server says is told as it is."""
    peer.failures.extend([status("UNAVAILABLE", "DRAINING", "the server is shutting down")] * 4)

    result = _run("models", peer=peer)

    assert "Error: DRAINING: the server is shutting down\n" == result.stderr


@pytest.mark.parametrize("command", [(), ("explain",), ("models",)])
def test_every_help_shows_examples(command: tuple[str, ...]) -> None:
    """Nobody should have to guess the first call."""
    result = _run(*command, "--help")

    assert 0 == result.exit_code
    assert "Examples:\n    camserve" in result.output


def test_help_and_version_load_neither_torch_nor_the_server() -> None:
    """The list of commands names the server's, but does not import them."""
    script = (
        "import sys\nfrom camserve.client.cli import main\n"
        "main(['--help'], standalone_mode=False)\nmain(['--version'], standalone_mode=False)\n"
        "wrong = [name for name in sys.modules if name == 'torch' or name.startswith('camserve.server')]\n"
        "assert not wrong, wrong\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)  # noqa: S603  # Ours.

    assert 0 == done.returncode, done.stderr
    assert "serve" in done.stdout
    assert importlib.metadata.version("camserve") in done.stdout


def test_a_command_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The light client knows of `serve` without having it."""
    missing = importlib.metadata.EntryPoint("serve", "camserve_not_installed.cli:serve", "camserve.commands")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [missing])

    result = _run("serve", "--model", "part.pt")

    assert 1 == result.exit_code
    assert "pip install 'camserve[server]'" in result.stderr


def test_commands_of_other_packages_join_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found in a group of their own, told without being imported, and miss their package in one line."""
    missing = importlib.metadata.EntryPoint("check", "camserve_not_installed.cli:check", "camserve.commands.models")
    groups = {"camserve.commands.models": [missing]}
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: groups.get(group, []))

    helped, run = _run("models", "--help"), _run("models", "check", "folder", "--json")

    assert re.search(r"check +Load the models of a repository", helped.output)
    assert 1 == run.exit_code
    assert "Error: 'camserve models check' needs more than the client: pip install 'camserve[server]' (" in run.stderr


def test_a_model_may_be_called_like_a_command(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`show` is what runs when the first word is no command, and can be written."""
    other = importlib.metadata.EntryPoint("surface", "camserve.client.cli_explain:explain", "camserve.commands.models")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [other])

    assert "layer2 (default)" in _run("models", "show", "surface", peer=peer).output
    assert "Predict and explain images" in _run("models", "surface", "--help").output


def test_commands_of_other_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run as if they were ours."""
    other = importlib.metadata.EntryPoint("again", "camserve.client.cli_models:models", "camserve.commands")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [other])

    assert "List the models" in _run("again", "--help").output
    assert "From camserve.client.cli_models:models." in _run("--help").output
