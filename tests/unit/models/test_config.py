from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from camserve.server.jobs import OutputKind
from camserve.server.models.config import ModelConfig, read_config, read_labels, read_phrases


@pytest.fixture
def card(tmp_path):
    """Writes a model.toml and gives its path."""

    def write(text: str) -> Path:
        path = tmp_path / "model.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_an_empty_card_suits_a_torchvision_classifier(card):
    """Every field has a default: 224 pixels, RGB, ImageNet's mean and standard deviation."""
    config = read_config(card(""))

    assert ModelConfig() == config
    recipe = config.recipe()
    assert (3, 224, 224) == recipe.shape
    assert ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) == (recipe.mean, recipe.std)


def test_a_full_card_is_read(card):
    """What is written arrives where it belongs."""
    config = read_config(
        card("""
            labels = ["good", "bad"]
            default_layer = "layer4"
            max_batch = 8
            precision = "float64"
            [input]
            size = [120, 160]
            resize = "letterbox"
            channels = "bgr"
            pad_value = 114
            mean = [0.5]
            std = [0.25]
            [output]
            path = "logits"
        """)
    )
    recipe = config.recipe()

    assert (("good", "bad"), "layer4", 8, "logits") == (
        config.labels,
        config.default_layer,
        config.max_batch,
        config.output.path,
    )
    assert ((3, 120, 160), "letterbox", "bgr", 114, "float64") == (
        recipe.shape,
        recipe.resize,
        recipe.channels,
        recipe.pad_value,
        recipe.dtype,
    )
    assert ((0.5,), (0.25,)) == (recipe.mean, recipe.std)


@pytest.mark.parametrize(
    ("written", "mean", "std"),
    [
        ("", (0.0,), (1.0,)),
        ("mean = [0.5]", (0.5,), (1.0,)),
        ("std = [0.5]", (0.0,), (0.5,)),
        ("mean = [0.5]\nstd = [0.25]", (0.5,), (0.25,)),
    ],
)
def test_a_gray_model_keeps_what_its_card_says(card, written, mean, std):
    """ImageNet's three values are no default for one channel, and neither of the two depends on the other being given."""
    recipe = read_config(card(f'[input]\nchannels = "gray"\n{written}\n')).recipe()

    assert ((1, 224, 224), mean, std) == (recipe.shape, recipe.mean, recipe.std)


def test_a_model_that_takes_no_images_names_its_shape(card):
    """Any rank."""
    recipe = read_config(card('[input]\nchannels = "none"\nshape = [12, 400]\n')).recipe()

    assert ((12, 400), False) == (recipe.shape, recipe.takes_images)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("labels = [", r"model\.toml: not TOML"),
        ("lables = []", r"model\.toml: lables: Extra inputs"),
        ("[input]\nsizes = [1, 2]", r"model\.toml: input\.sizes: Extra inputs"),
        ("[input]\nsize = [224]", r"model\.toml: input\.size\.1: Field required"),
        ('[input]\nresize = "zoom"', r"model\.toml: input\.resize: Input should be 'stretch'"),
        ("[input]\nsize = [0, 224]", r"model\.toml: input: shape \(3, 0, 224\) must"),
        ("[input]\nstd = [0.0]", r"model\.toml: input: std .* must be above 0"),
        ("max_batch = 0", r"model\.toml: max_batch: "),
        ('precision = "int8"', r"model\.toml: precision: "),
        ('[output]\nkind = "captioning"', r"model\.toml: output\.kind: "),
        ("[factory]\npretrained = true", r"model\.toml: factory\.name: Field required"),
        ('[[explain]]\nmethod = "grad-cam"', r"model\.toml: explain\.0\.name: Field required"),
        ('[[explain]]\nname = "a"', r"model\.toml: explain\.0\.method: Field required"),
        ('[[explain]]\nname = "a b"\nmethod = "grad-cam"', r"model\.toml: explain\.0\.name: "),
        ('[[explain]]\nname = "a"\nmethod = "grad-cam"\nsample = 1.5', r"model\.toml: explain\.0\.sample: "),
        (
            '[[explain]]\nname = "a"\nmethod = "grad-cam"\nwhen = "score < 1"',
            r"model\.toml: explain\.0: .*rule 'a', when: line 1, column 7: .*with a point",
        ),
        (2 * '[[explain]]\nname = "a"\nmethod = "grad-cam"\n', r"model\.toml: .*rule 'a' is written twice"),
        ('labels_file = "nowhere.txt"', r"cannot read the labels in .*nowhere\.txt"),
        ('labels = ["a"]\nlabels_file = "labels.txt"', "labels and labels_file are both given"),
    ],
)
def test_a_wrong_card_names_file_and_field(card, text, complaint):
    """Whoever wrote it is told where to look."""
    with pytest.raises(ValueError, match=complaint):
        read_config(card(text))


@pytest.mark.parametrize("text", ["cat\ndog\n", "cat\ndog", "cat\r\ndog\r\n", "\ufeffcat\ndog\n\n\n", " cat \ndog\t\n"])
def test_labels_are_read_however_the_file_ends(card, tmp_path, text):
    """With or without a last newline, from any system, no label is lost or changed."""
    (tmp_path / "labels.txt").write_bytes(text.encode())

    assert ("cat", "dog") == read_labels(tmp_path / "labels.txt")
    assert ("cat", "dog") == read_config(card('labels_file = "labels.txt"')).labels


@pytest.mark.parametrize(("text", "line"), [("cat\n\ndog\n", 2), ("\ncat\n", 1), ("", 1)])
def test_an_empty_label_is_refused(tmp_path, text, line):
    """Dropping the line would shift every label after it, and an empty file labels nothing."""
    path = tmp_path / "labels.txt"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(ValueError, match=rf"labels\.txt, line {line}: it is empty"):
        read_labels(path)


@pytest.mark.parametrize("kind", OutputKind)
def test_every_kind_of_output_has_its_word(card, kind):
    """As requests and answers write it."""
    assert kind is read_config(card(f'[output]\nkind = "{kind}"')).output.kind


@pytest.mark.parametrize(
    ("precision", "rows"), [("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64")]
)
def test_rows_for_half_precision_are_made_in_single(card, precision, rows):
    """The host has no bfloat16."""
    config = read_config(card(f'precision = "{precision}"'))

    assert (precision, rows) == (config.precision, config.recipe().dtype)


def test_further_inputs_keep_their_order(card):
    """The model takes them as they are written."""
    config = read_config(
        card("""
            [input.extra.question]
            shape = [12]
            dtype = "int64"
            [input.extra.age]
            [input.extra.depth]
            shape = [1, 8, 8]
        """)
    )

    assert [("question", (12,), "int64"), ("age", (), "float32"), ("depth", (1, 8, 8), "float32")] == [
        (name, extra.shape, extra.dtype) for name, extra in config.input.extra.items()
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[output]\nphrases = "p.safetensors"',
            "phrases are compared with embeddings, and output.kind is 'classification'",
        ),
        ("[input.extra.age]\nshape = [0]", "input.extra.age.shape"),
        ('[input.extra.age]\ndtype = "complex64"', "input.extra.age.dtype"),
        ('precision = "int8"', "precision"),
    ],
)
def test_a_card_that_makes_no_sense_names_the_field(card, text, message):
    """With what is allowed."""
    with pytest.raises(ValueError, match=message):
        read_config(card(text))


def test_phrases_are_read_in_order(tmp_path):
    """As single precision, whatever they were saved in."""
    path = tmp_path / "phrases.safetensors"
    save_file({"a scratch": np.array([0.0, 2.0]), "a dent": np.array([1.0, 0.5], np.float16)}, path)

    assert {"a dent": [1.0, 0.5], "a scratch": [0.0, 2.0]} == {
        phrase: vector.tolist() for phrase, vector in read_phrases(path, 2).items()
    }
    assert ["a dent", "a scratch"] == list(read_phrases(path, 2))
    assert {np.dtype(np.float32)} == {vector.dtype for vector in read_phrases(path, 2).values()}


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({}, "no phrase"),
        ({"a": np.zeros(2)}, "'a' is a tensor of shape"),
        ({"a": np.ones((1, 2))}, "'a' is a tensor of shape"),
        ({"a": np.ones(2), "b": np.ones(3)}, "'b' is a tensor of shape"),
        ({"a": np.array([1.0, np.nan])}, "'a' is a tensor of shape"),
    ],
)
def test_phrases_that_cannot_be_compared_are_refused(tmp_path, vectors, message):
    """At load, with the phrase at fault."""
    path = tmp_path / "phrases.safetensors"
    save_file(vectors, path)

    with pytest.raises(ValueError, match=message):
        read_phrases(path, 2)


def test_a_file_that_holds_no_tensors_is_refused(tmp_path):
    """With its path."""
    path = tmp_path / "phrases.safetensors"
    path.write_text("a dent", encoding="utf-8")

    with pytest.raises(ValueError, match=r"cannot read the phrases in .*safetensors"):
        read_phrases(path, 2)
    with pytest.raises(ValueError, match=r"cannot read the phrases in .*absent"):
        read_phrases(tmp_path / "absent", 2)


def test_phrases_lie_beside_the_card(card, tmp_path):
    """Wherever the server was started."""
    config = read_config(card('[output]\nkind = "embedding"\nphrases = "p.safetensors"'))

    assert str(tmp_path / "p.safetensors") == config.output.phrases


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("latest = 0", r"versions\.latest: Input should be greater than 0"),
        ('policy = "newest"', r"versions\.policy: Input should be 'latest', 'all' or 'listed'"),
        ('policy = "listed"', r"write listed = \[\"1\"\], or take another policy"),
        ('listed = ["1"]', "listed is given, but the policy is 'latest'; set policy to 'listed'"),
        ('policy = "all"\nlatest = 2', "latest is given, but the policy is 'all'"),
        ('labels = {"3" = "3"}', r"versions\.labels\.3"),
        ('labels = {"1.5" = "3"}', r"versions\.labels"),
        ('labels = {"../x" = "3"}', r"versions\.labels"),
    ],
)
def test_versions_that_make_no_sense_are_refused(card, text, complaint):
    """A label that looks like a number would hide a version; each policy has its own field."""
    with pytest.raises(ValueError, match=complaint):
        read_config(card(f"[versions]\n{text}"))


def test_a_card_that_was_written_out_whole_is_read_again(card):
    """The process that compiles a plan is given one."""
    config = read_config(card('[versions]\npolicy = "all"\nlabels = {stable = 3}'))

    assert config == ModelConfig.model_validate_json(config.model_dump_json())
