"""Explanations that nobody asked for: rules of a model, on a real server."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from support.architectures import eager
from support.fragile import MARK, fragile_source, gradient_free
from support.gated import GATE, gated_source
from support.nets import MeanColour
from support.patience import under_a_deadline
from support.servers import Metrics, script_source, settings, until

from camserve.client import AsyncClient, Client, Heatmap, Prediction, Result, Spec, Summary, TensorInput
from camserve.client.cli import main
from camserve.server.background import BackgroundServer
from camserve.server.local import LocalExplainer
from camserve.server.models.config import InputConfig, ModelConfig, OutputConfig, RuleConfig
from camserve.server.models.sources import ModelSource, demo_sources, scan_repository

ROOT = Path(__file__).resolve().parents[2]
LABELS = ("red", "green", "blue")
REJECTS = RuleConfig(name="rejects", when='label == "red" || score < 0.4', method="grad-cam")
CONTROL = RuleConfig(name="control", sample=0.1, method="layercam", encoding="float32")


def colour_source(folder, *rules: RuleConfig, name: str = "colour", **config: object) -> ModelSource:
    """A model whose logits are the means of its channels, so that an input chooses its prediction."""
    return script_source(name, MeanColour(), folder, labels=LABELS, default_layer="features", explain=rules, **config)


def tinted(red: float = 0.0, green: float = 0.0, blue: float = 0.0, seed: int = 0) -> TensorInput:
    """An input whose channels have about these means."""
    noise = np.random.default_rng(seed).normal(0, 0.1, (3, 32, 32))
    return TensorInput((noise + np.array([red, green, blue])[:, None, None]).astype(np.float32))


def together(server: BackgroundServer, calls: Sequence[Callable[[AsyncClient], object]]) -> list[Result]:
    """Results of calls that all wait before the device is free, so that they share passes."""
    metrics = Metrics(server)

    async def run():
        GATE.reset()
        async with AsyncClient(server.target) as client:
            holder = asyncio.create_task(client.explain(tinted(), model="gated", specs=["grad-cam"]))
            await asyncio.to_thread(GATE.reached.wait, 120)
            running = [asyncio.ensure_future(call(client)) for call in calls]
            await until(lambda: metrics.value("camserve_queue_depth") == len(calls))
            GATE.opened.set()
            await holder
            return await asyncio.gather(*running)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`plain` without rules, `colour` with two, and the model that holds the device."""
    folder = tmp_path_factory.mktemp("models")
    GATE.opened.set()
    sources = [colour_source(folder, name="plain"), colour_source(folder, REJECTS, CONTROL), gated_source()]
    with BackgroundServer(settings(batch_window_seconds=0.2), sources) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    """Of that server."""
    with Client(server.target) as client:
        yield client


def taken_by(rule: RuleConfig, count: int, *, is_taken: bool) -> list[str]:
    """Request ids that a rule's sample takes, or leaves out, worked out as the documentation tells."""
    found = []
    number = 0
    while len(found) < count:
        request_id = f"part-{number}"
        number += 1
        first = hashlib.sha256(f"{rule.name}\n{request_id}".encode()).digest()[:8]
        if (int.from_bytes(first, "big") / 2**64 < rule.sample) is is_taken:
            found.append(request_id)
    return found


def test_each_row_of_a_shared_pass_has_what_its_own_prediction_calls_for(server):
    """Eight prediction-only requests in one pass: the red ones come with a map under the rule's name, the others without."""
    (left_out,) = taken_by(CONTROL, 1, is_taken=False)
    inputs = [tinted(red=3, seed=seed) if seed % 3 == 0 else tinted(green=3, seed=seed) for seed in range(8)]

    results = together(
        server,
        [lambda client, row=row: client.explain(row, model="colour", request_id=left_out) for row in inputs],
    )

    assert {8} == {result.summary.batch_rows for result in results}
    assert {3} == {result.summary.pass_explanations for result in results}
    for seed, result in enumerate(results):
        is_red = seed % 3 == 0
        assert ("red" if is_red else "green") == result.prediction.label
        assert (["rejects"] if is_red else []) == [heatmap.rule for heatmap in result.heatmaps]
        assert {"rejects": "applied" if is_red else "not-met", "control": "not-sampled"} == result.summary.rules
        assert () == result.errors


def test_a_rules_map_has_the_bits_of_the_same_spec_asked_for(server):
    """The card's spec, sent by a caller who skips rules, gives the same map among as many rows."""
    with Client(server.target) as client:
        (rule, _) = client.model("colour").rules
    calls = [
        lambda client: client.explain(tinted(red=3), model="colour"),
        lambda client: client.explain(tinted(red=3), model="colour", specs=[rule.spec], skip_rules=True),
        lambda client: client.explain(tinted(red=3), model="plain", specs=[rule.spec, "layercam"]),
        lambda client: client.explain(tinted(blue=3), model="plain", specs=["hirescam"]),
    ]

    by_rule, by_caller, _, _ = together(server, calls)

    assert {2} == {by_rule.summary.batch_rows, by_caller.summary.batch_rows}
    assert ("rejects", "") == (by_rule.heatmaps[0].rule, by_caller.heatmaps[0].rule)
    assert by_rule.heatmaps[0].raw_sha256 == by_caller.heatmaps[0].raw_sha256
    assert {} == by_caller.summary.rules


def test_neighbours_of_rules_keep_their_bits(server):
    """A caller's own map is the same whether the rule of the other row is met, not met, or skipped."""
    digests = set()
    for other, skip in [(tinted(red=3), False), (tinted(green=3), False), (tinted(red=3), True)]:
        mine, _ = together(
            server,
            [
                lambda client: client.explain(tinted(blue=1), model="colour", specs=["hirescam"], skip_rules=True),
                lambda client, other=other, skip=skip: client.explain(
                    other, model="colour", specs=["xgrad-cam"], skip_rules=skip
                ),
            ],
        )
        assert 2 == mine.summary.batch_rows
        (best,) = mine.prediction.classes[:1]
        digests.add((mine.heatmaps[0].raw_sha256, best.logit))

    assert 1 == len(digests)


def test_what_a_caller_asks_comes_first_and_rules_behind_it(client):
    """Own specs keep their places; the rule's index goes on behind them, and its prediction came before everything."""
    (request_id,) = taken_by(CONTROL, 1, is_taken=True)

    events = list(client.stream(tinted(red=3), model="colour", specs=["cam", Spec("eigen-cam")], request_id=request_id))

    assert isinstance(events[0], Prediction)
    assert isinstance(events[-1], Summary)
    maps = sorted((event.spec_index, event.method, event.rule) for event in events if isinstance(event, Heatmap))
    assert [(0, "cam", ""), (1, "eigen-cam", ""), (2, "grad-cam", "rejects"), (3, "layercam", "control")] == maps


def test_a_sample_takes_the_requests_that_anybody_can_work_out(client):
    """A tenth: those of the documented formula and no other, again when they are sent again."""
    taken, left_out = taken_by(CONTROL, 5, is_taken=True), taken_by(CONTROL, 5, is_taken=False)
    (_, rule) = client.model("colour").rules

    for request_id in [*taken, *left_out, *taken]:
        result = client.explain(tinted(green=3), model="colour", request_id=request_id)

        assert rule.takes(request_id) is (request_id in taken)
        expected = "applied" if request_id in taken else "not-sampled"
        assert (expected, "not-met") == (result.summary.rules["control"], result.summary.rules["rejects"])
        assert (["float32"] if request_id in taken else []) == [heatmap.encoding for heatmap in result.heatmaps]


def test_a_caller_may_skip_rules(client):
    """Nothing is added and nothing told, on the wire and on the command line."""
    result = client.explain(tinted(red=3), model="colour", skip_rules=True)

    assert ((), {}, "forward") == (result.heatmaps, result.summary.rules, result.summary.plan)


def test_a_model_without_rules_is_as_ever(client):
    """No rule on its card, none in its summary, and a prediction alone is a forward alone."""
    result = client.explain(tinted(red=3), model="plain")

    assert ((), {}, "forward") == (client.model("plain").rules, result.summary.rules, result.summary.plan)


def test_the_card_tells_its_rules(client):
    """In the words of model.toml, with a spec that can be sent."""
    rejects, control = client.model("colour").rules

    assert ("rejects", 'label == "red" || score < 0.4', 1.0) == (rejects.name, rejects.when, rejects.sample)
    assert ("control", "", 0.1, {"method": "METHOD_LAYER_CAM", "encoding": "ENCODING_FLOAT32"}) == (
        control.name,
        control.when,
        control.sample,
        control.asks,
    )
    assert Spec("layercam", encoding="float32").to_proto().method == control.spec.method


def test_rules_are_counted(server, client):
    """One outcome for each rule and answered request."""
    metrics = Metrics(server)
    (taken,), (left_out,) = taken_by(CONTROL, 1, is_taken=True), taken_by(CONTROL, 1, is_taken=False)

    def counts() -> list[float]:
        return [
            metrics.value("camserve_rules_total", model="colour", rule=rule, outcome=outcome)
            for rule, outcome in [
                ("rejects", "applied"),
                ("rejects", "not-met"),
                ("control", "applied"),
                ("control", "not-sampled"),
            ]
        ]

    before = counts()
    client.explain(tinted(red=3), model="colour", request_id=taken)
    client.explain(tinted(green=3), model="colour", request_id=left_out)
    client.explain(tinted(red=3), model="colour", request_id=left_out, skip_rules=True)

    assert [1, 1, 1, 1] == [after - was for after, was in zip(counts(), before, strict=True)]


def test_no_gradient_is_taken_for_a_condition_that_does_not_hold(tmp_path, serve):
    """The backward of this model tells how many rows went through it: those of the rule that is met, and no other."""
    GATE.opened.set()
    gated = gated_source()
    rule = RuleConfig(name="asked", when='"line" in labels', method="grad-cam")
    source = dataclasses.replace(gated, config=gated.config.model_copy(update={"explain": (rule,)}))
    server = serve(source)
    with Client(server.target) as client:
        GATE.rows_backward = 0
        not_met = client.explain(tinted(), model="gated")
        went_back = GATE.rows_backward
        met = client.explain(tinted(), model="gated", labels={"line": "3"})

    assert (0, "not-met", ()) == (went_back, not_met.summary.rules["asked"], not_met.heatmaps)
    assert (1, "applied") == (GATE.rows_backward, met.summary.rules["asked"])


def test_an_amplified_rule_begins_only_where_it_is_met(tmp_path, serve):
    """RISE for red parts: no chunk of it runs for a green one, and its map comes behind the prediction of a red one."""
    rule = RuleConfig(name="deep", when='label == "red"', method="rise", parameters={"samples": 40, "seed": 5})
    server = serve(colour_source(tmp_path, rule))
    metrics = Metrics(server)
    with Client(server.target) as client:
        green = client.explain(tinted(green=3), model="colour")
        chunks = metrics.value("camserve_pass_seconds_count", phase="amplified")
        red = client.explain(tinted(red=3), model="colour", specs=["grad-cam"])
        (same,) = client.explain(
            tinted(red=3), model="colour", specs=[Spec("rise", samples=40, seed=5)], skip_rules=True
        ).heatmaps

    assert ({"deep": "not-met"}, 0) == (green.summary.rules, chunks)
    assert ["", "deep"] == [heatmap.rule for heatmap in red.heatmaps]
    assert same.raw_sha256 == red.heatmaps[1].raw_sha256
    assert metrics.value("camserve_pass_seconds_count", phase="amplified") > 0


def test_a_condition_without_a_value_fails_its_rule_alone(tmp_path, serve):
    """It divides by the length of a label's text, which one request leaves empty."""
    rule = RuleConfig(name="odd", when='"line" in labels && 6 / size(labels.line) > 1', method="grad-cam")
    server = serve(colour_source(tmp_path, rule))
    with Client(server.target) as client:
        fine = client.explain(tinted(red=3), model="colour", labels={"line": "3"})
        failed = client.explain(tinted(red=3), model="colour", specs=["cam"], labels={"line": ""})

    assert {"odd": "applied"} == fine.summary.rules
    assert ({"odd": "failed"}, ["cam"]) == (failed.summary.rules, [heatmap.method for heatmap in failed.heatmaps])
    (error,) = failed.errors
    assert (1, "odd", "RULE_FAILED", "INTERNAL") == (error.spec_index, error.rule, error.error.reason, error.error.code)
    assert "divide by zero" in error.error.message
    failed.raise_for_errors()


def test_a_model_that_fails_because_of_a_rule_still_predicts(tmp_path, serve):
    """An input that this model only bears in a forward without a gradient: the rule fails, the prediction comes."""
    rule = RuleConfig(name="always", method="grad-cam")
    source = fragile_source(gradient_free, explain=(rule,))
    server = serve(source)
    marked = np.random.default_rng(0).standard_normal((3, 32, 32)).astype(np.float32)
    marked[:, 0, 0] = MARK
    with Client(server.target) as client:
        plain = client.explain(TensorInput(marked), model="gradient-free", skip_rules=True)
        result = client.explain(TensorInput(marked), model="gradient-free")
        unmarked = client.explain(tinted(), model="gradient-free")

    assert plain.prediction.classes == result.prediction.classes
    assert ({"always": "failed"}, ()) == (result.summary.rules, result.heatmaps)
    (error,) = result.errors
    assert ("always", "MODEL_FAILED") == (error.rule, error.error.reason)
    assert {"always": "applied"} == unmarked.summary.rules


def test_an_overlay_of_a_tensor_fails_its_rule_where_it_is_met(tmp_path, serve):
    """There is no picture to draw on: told for the red part, and for the green one nothing at all."""
    rule = RuleConfig(name="picture", when='label == "red"', method="grad-cam", encoding="overlay-png")
    server = serve(colour_source(tmp_path, rule))
    with Client(server.target) as client:
        red = client.explain(tinted(red=3), model="colour")
        green = client.explain(tinted(green=3), model="colour")
        picture = client.explain(np.full((32, 32, 3), (255, 0, 0), np.uint8), model="colour")

    assert [("picture", "FIELD_INVALID")] == [(error.rule, error.error.reason) for error in red.errors]
    assert ({"picture": "not-met"}, ()) == (green.summary.rules, green.errors)
    assert ["overlay-png"] == [heatmap.encoding for heatmap in picture.heatmaps]


def test_a_region_outside_of_an_image_fails_its_rule_alone(tmp_path, serve):
    """A rule about a place that this input does not have."""
    rule = RuleConfig(
        name="corner",
        method="grad-cam",
        target={"region": {"box": {"left_pixels": 40, "top_pixels": 28, "width_pixels": 8, "height_pixels": 4}}},
    )
    source = eager("seg", "unet", InputConfig(size=(32, 48)), output=OutputConfig(kind="segmentation"), explain=(rule,))
    server = serve(source)
    with Client(server.target) as client:
        large = client.explain(np.zeros((32, 48, 3), np.uint8), model="seg")
        small = client.explain(np.zeros((16, 24, 3), np.uint8), model="seg")

    assert {"corner": "applied"} == large.summary.rules
    assert ({"corner": "failed"}, "FIELD_INVALID") == (small.summary.rules, small.errors[0].error.reason)
    assert small.prediction.classes


def test_a_deadline_ends_what_rules_add_and_not_the_request(serve, tmp_path):
    """The device is held in the rule's gradient beyond the caller's deadline: prediction and summary arrive in time."""
    GATE.opened.set()
    gated = gated_source()
    rule = RuleConfig(name="slow", method="grad-cam")
    source = dataclasses.replace(gated, config=gated.config.model_copy(update={"explain": (rule,)}))
    server = serve(source)

    def held(seconds: float) -> Result:
        GATE.reset()
        try:
            return client.explain(tinted(), model="gated", deadline=seconds)
        finally:
            GATE.opened.set()

    with Client(server.target, timeout=120) as client:
        result = under_a_deadline(held)

    assert ({"slow": "failed"}, ()) == (result.summary.rules, result.heatmaps)
    assert [("slow", "DEADLINE_EXCEEDED")] == [(error.rule, error.error.reason) for error in result.errors]
    assert result.prediction.classes
    assert 1 == result.summary.batch_rows


def test_a_rule_that_fits_no_model_keeps_it_from_serving(serve, tmp_path):
    """It is told with the file, the rule and what would be right."""
    folder = tmp_path / "repository" / "colour"
    (folder / "1").mkdir(parents=True)
    torch.jit.save(torch.jit.script(MeanColour().eval()), str(folder / "1" / "model.pt"))
    (folder / "model.toml").write_text(
        '[input]\nsize = [32, 32]\n[[explain]]\nname = "deep"\nmethod = "grad-cam"\nlayers = ["layer9"]\n'
    )

    with pytest.raises(
        ValueError, match=r"model\.toml: rule 'deep': layer 'layer9' is not in model 'colour'; default: features"
    ):
        serve(*scan_repository(tmp_path / "repository"))


def test_local_explanations_follow_the_rules_too(server, tmp_path):
    """The same request gives the same maps without a server, and its rules the same verdicts."""
    (request_id,) = taken_by(CONTROL, 1, is_taken=True)
    with Client(server.target) as client:
        served = client.explain(tinted(red=3), model="colour", request_id=request_id)
    with LocalExplainer(colour_source(tmp_path, REJECTS, CONTROL), settings()) as explainer:
        local = explainer.explain(tinted(red=3), request_id=request_id)
        skipped = explainer.explain(tinted(red=3), request_id=request_id, skip_rules=True)

    assert {"rejects": "applied", "control": "applied"} == served.summary.rules == local.summary.rules
    assert [(one.rule, one.raw_sha256) for one in served.heatmaps] == [
        (one.rule, one.raw_sha256) for one in local.heatmaps
    ]
    assert ((), {}) == (skipped.heatmaps, skipped.summary.rules)


def test_the_worked_examples_do_what_they_tell(samples):
    """The rules of docs/operations.md on the shipped model: scratches come with a reason, a sample for drift with two maps."""
    (section,) = re.findall(
        r"^## Explain only if\n.*?^```toml\n(.*?)^```",
        (ROOT / "docs/operations.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    rules = ModelConfig.model_validate(tomllib.loads(section)).explain
    (demo,) = demo_sources()
    source = dataclasses.replace(demo, config=demo.config.model_copy(update={"explain": rules}))
    (taken,), (left_out,) = taken_by(rules[1], 1, is_taken=True), taken_by(rules[1], 1, is_taken=False)
    with LocalExplainer(source, settings()) as explainer:
        answers = {
            path.name: explainer.explain(path, request_id=request_id)
            for path, request_id in zip(samples, itertools.cycle([taken, left_out]), strict=False)
        }

    assert {"scratch", "good"} <= {result.prediction.label for result in answers.values()}
    for result in answers.values():
        best = result.prediction
        is_reject = best.label == "scratch" or best.probability < 0.6
        is_taken = result.summary.request_id == taken
        expected = ["rejects"] * is_reject + ["drift", "drift"] * is_taken
        assert expected == [heatmap.rule for heatmap in result.heatmaps]


def test_the_command_prints_and_names_what_rules_made(server, tmp_path):
    """`rule` in each line, in the names of files, and nothing of it with --skip-rules."""
    Image.new("RGB", (32, 32), (250, 5, 5)).save(tmp_path / "part.png")
    flags = ["explain", str(tmp_path / "part.png"), "--server", server.target, "--model", "colour", "-m", "cam"]

    done = CliRunner().invoke(main, [*flags, "--out", str(tmp_path / "maps")])
    skipped = CliRunner().invoke(main, [*flags, "--skip-rules"])

    line = json.loads(done.stdout)
    assert 0 == done.exit_code
    assert ["", "rejects"] == [heatmap["rule"] for heatmap in line["heatmaps"]][:2]
    assert "applied" == line["summary"]["rules"]["rejects"]
    assert (tmp_path / "maps" / "part.grad-cam.rejects.png").is_file()
    assert [""] == [heatmap["rule"] for heatmap in json.loads(skipped.stdout)["heatmaps"]]
