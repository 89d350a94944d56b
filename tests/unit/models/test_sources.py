from __future__ import annotations

from pathlib import Path

import pytest

from camserve.server.models.sources import (
    demo_sources,
    files_of,
    from_flag,
    read_folder,
    scan_repository,
    version_order,
)


def model(root: Path, *files: str, toml: str | None = None) -> Path:
    """Puts empty files, and a model.toml, below a model's folder."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    if toml is not None:
        root.mkdir(parents=True, exist_ok=True)
        (root / "model.toml").write_text(toml, encoding="utf-8")
    return root


def test_a_repository_gives_the_newest_version_of_each_model(tmp_path):
    """Versions count as numbers: 10 is newer than 9, and any number newer than a name."""
    model(tmp_path / "part", "2/model.pt", "9/model.pt", "10/model.pt", "draft/model.pt")
    model(tmp_path / "board", "1/model.pt2", toml='labels = ["good", "bad"]')

    sources = list(scan_repository(tmp_path))

    assert [("board", "1"), ("part", "10")] == [(source.name, source.version) for source in sources]
    assert tmp_path / "part" / "10" / "model.pt" == sources[1].path
    assert ("good", "bad") == sources[0].config.labels


def test_a_repository_gives_what_each_policy_asks_for(tmp_path):
    """Several versions of a model, if its card says so; each knows its own folder."""
    toml = '[versions]\nlatest = 2\nlabels = {stable = "1"}'
    model(tmp_path / "part", "1/model.pt", "2/model.pt", "3/model.pt", "4/model.pt", toml=toml)

    sources = list(scan_repository(tmp_path))

    assert ["1", "3", "4"] == [source.version for source in sources]
    assert tmp_path / "part" / "3" == sources[1].folder
    assert ["1", "2", "3", "4"] == list(read_folder(tmp_path / "part").sources)


def test_files_tell_whether_a_version_has_changed(tmp_path):
    """Its own files and its card count; those of other versions, and which versions serve, do not."""
    part = model(tmp_path / "part", "1/model.pt", "2/model.pt", toml="max_batch = 4")

    def of_first():
        return files_of(read_folder(part).sources["1"])

    before = of_first()
    (part / "2" / "model.pt").write_bytes(b"other")
    (part / "model.toml").write_text('max_batch = 4\n[versions]\npolicy = "all"', encoding="utf-8")
    assert before == of_first()

    (part / "1" / "model.pt").write_bytes(b"new")
    after = of_first()
    assert before != after
    (part / "model.toml").write_text("max_batch = 8", encoding="utf-8")
    assert after != of_first()


def test_versions_are_sorted_by_number():
    """Names come before numbers, numbers by value."""
    assert ["a", "b", "2", "9", "10"] == sorted(["10", "b", "9", "a", "2"], key=version_order)


def test_an_export_goes_before_a_script(tmp_path):
    """Where a version holds several files the order is fixed."""
    model(tmp_path / "part", "1/weights.safetensors", "1/model.pt", "1/model.pt2")

    assert ["model.pt2"] == [source.path.name for source in scan_repository(tmp_path)]


def test_what_is_no_model_is_passed_over(tmp_path):
    """Files beside models, hidden folders, and folders without a model file beside versions."""
    model(tmp_path / "part", "1/model.pt", ".cache/model.pt", "notes/readme.txt")
    model(tmp_path / ".git", "1/model.pt")
    (tmp_path / "README.md").touch()

    assert [("part", "1")] == [(source.name, source.version) for source in scan_repository(tmp_path)]


def test_a_factory_needs_no_file(tmp_path):
    """A version folder may be empty when the card names a factory."""
    model(tmp_path / "net", toml='[factory]\nname = "torchvision:resnet18"\nrandom_seed = 0')
    (tmp_path / "net" / "1").mkdir()

    assert [("net", None)] == [(source.name, source.path) for source in scan_repository(tmp_path)]


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ((), "holds no models: expected"),
        (("part/model.pt",), r"holds no version: expected .*part/1/"),
        (("part/1/model.onnx",), r"with one of model\.pt2, model\.pt"),
        (("my part/1/model.pt",), "'my part' is not a model name"),
    ],
)
def test_a_repository_that_cannot_be_served_is_refused(tmp_path, files, complaint):
    """The text says what was looked for."""
    model(tmp_path, *files)

    with pytest.raises(ValueError, match=complaint):
        list(scan_repository(tmp_path))


def test_a_repository_that_does_not_exist_is_refused(tmp_path):
    """A typing error in the path is not an empty server."""
    with pytest.raises(ValueError, match="is not a folder"):
        list(scan_repository(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("text", "name"), [("{}/part.pt", "part"), ("board={}/part.pt", "board"), ("a.b-c_1={}/part.pt", "a.b-c_1")]
)
def test_a_file_is_served_under_its_name_or_the_given_one(tmp_path, text, name):
    """`--model part.pt` and `--model name=part.pt`."""
    (tmp_path / "part.pt").touch()

    source = from_flag(text.format(tmp_path))

    assert (name, "1", tmp_path / "part.pt") == (source.name, source.version, source.path)
    assert (3, 224, 224) == source.config.recipe().shape


def test_size_and_labels_go_to_the_card(tmp_path):
    """A labels file without a last newline loses no label."""
    (tmp_path / "part.pt").touch()
    (tmp_path / "labels.txt").write_text("good\nbad", encoding="utf-8")

    source = from_flag(f"{tmp_path}/part.pt", size=96, labels=tmp_path / "labels.txt")

    assert ("good", "bad") == source.config.labels
    assert (3, 96, 96) == source.config.recipe().shape
    assert not source.config.plan.compile
    assert from_flag(f"{tmp_path}/part.pt", is_compiled=True).config.plan.compile


def test_a_factory_is_pretrained_unless_random_weights_are_asked_for():
    """How its input is made is told by the weights when they are loaded, unless a size is given."""
    source = from_flag("torchvision:resnet50")
    random = from_flag("net=torchvision:resnet50", random_seed=0, size=64)

    assert ("resnet50", None, True) == (source.name, source.path, source.config.factory.pretrained)
    assert ("net", False, 0) == (random.name, random.config.factory.pretrained, random.config.factory.random_seed)
    assert (3, 64, 64) == random.config.recipe().shape


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nowhere.pt", r"nowhere\.pt does not exist; write name=path"),
        ("resnet50", r"resnet50 does not exist; write name=path/to/model\.pt or torchvision:resnet50"),
        ("my part={}/part.pt", "'my part' is not a model name; use letters"),
        ("={}/part.pt", "'' is not a model name"),
        ("timm:hf_hub:someone/net", r"is not a model name; .*name="),
    ],
)
def test_a_flag_that_names_no_model_is_refused(tmp_path, text, complaint):
    """The text says how to write it."""
    (tmp_path / "part.pt").touch()

    with pytest.raises(ValueError, match=complaint):
        from_flag(text.format(tmp_path))


def test_a_size_of_zero_is_not_the_default(tmp_path):
    """It is refused when the model is loaded, not quietly taken for 224."""
    (tmp_path / "part.pt").touch()

    with pytest.raises(ValueError, match=r"shape \(3, 0, 0\)"):
        from_flag(f"{tmp_path}/part.pt", size=0).config.recipe()


def test_the_demo_model_is_shipped():
    """`camserve serve` without arguments has something to serve."""
    sources = demo_sources()

    assert ["surface"] == [source.name for source in sources]
    assert sources[0].path.is_file()
    assert sources[0].config.labels
