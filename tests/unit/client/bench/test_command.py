from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result

from camserve.client import cli
from camserve.v1 import explanation_service_pb2, spec_pb2
from tests.unit.client.conftest import Peer, status

QUICK = ("--requests", "6", "--warm-up", "0", "--concurrency", "2", "--inputs", "2", "--synthetic", "32x32")


def _bench(peer: Peer | None, *arguments: str) -> Result:
    server = ["--server", peer.target] if peer else []
    return CliRunner().invoke(cli.main, ["bench", *arguments, *server])


def test_a_sweep_prints_tables_and_writes_both_files(peer: Peer, tmp_path: Path) -> None:
    """Throughput, latency and stages for each load; JSON and a page beside them."""
    arguments = (
        *QUICK[:-5],
        "1,2",
        *QUICK[-4:],
        "--json",
        str(tmp_path / "run.json"),
        "--html",
        str(tmp_path / "run.html"),
    )

    result = _bench(peer, *arguments, "--target-ms", "10000")

    assert 0 == result.exit_code, result.output
    for told in ("surface, version 2", "1 caller", "2 callers", "p99", "good/s ≤ 10000 ms", "Mean time by stage"):
        assert told in result.stdout
    assert "2 callers: " in result.stderr
    written = json.loads((tmp_path / "run.json").read_text())
    assert [(1, 6, 6), (2, 6, 6)] == [
        (step["load"]["concurrency"], step["answered"], step["good"]) for step in written["steps"]
    ]
    assert written["is_complete"]
    assert "<svg" in (tmp_path / "run.html").read_text()
    assert len(peer.requests) == 1 + 12


def test_a_mix_asks_for_each_kind_with_what_was_set(peer: Peer) -> None:
    """Each kind is asked for once, then drawn; layers, fields, lane and deadline are in every request."""
    kinds = ("-m", "grad-cam@layer2,eigen-cam=2", "-m", "prediction", "--set", "target=1")

    result = _bench(peer, *QUICK, *kinds, "--lane", "bulk", "--deadline", "5")

    assert 0 == result.exit_code, result.output
    first, second, *load = peer.requests
    assert (2, 0) == (len(first.specs), len(second.specs))
    assert {2, 0} == {len(request.specs) for request in load}
    assert 6 == len(load)
    for request in load:
        assert (explanation_service_pb2.LANE_BULK, 5) == (request.lane, request.deadline.seconds)
        assert {1} >= {spec.target.class_index for spec in request.specs}
        assert list(request.extra_inputs) == ["mask"]
    assert ["layer2"] == list(first.specs[0].layers)
    assert spec_pb2.METHOD_EIGEN_CAM == first.specs[1].method
    assert "Latency by kind of request" in result.stdout


def test_a_baseline_is_sent_in_turn(peer: Peer) -> None:
    """Predictions and explanations alternate in short rounds, and their ratio is told."""
    result = _bench(peer, *QUICK, "--baseline", "--rounds", "2")

    assert 0 == result.exit_code, result.output
    explained = [bool(request.specs) for request in peer.requests[1:]]
    assert [False] * 3 + [True] * 3 + [True] * 3 + [False] * 3 == explained
    assert "an answer of the mix costs" in result.stdout
    assert "2 callers, predictions" in result.stdout


def test_an_open_loop_counts_by_rate(peer: Peer) -> None:
    """Rates are swept as concurrency is."""
    result = _bench(peer, "--rate", "50,100", *QUICK[:4], *QUICK[6:])

    assert 0 == result.exit_code, result.output
    assert "50/s" in result.stdout
    assert "100/s" in result.stdout


def test_tensors_have_the_shape_of_the_card(peer: Peer) -> None:
    """With --tensor nothing is decoded or resized."""
    result = _bench(peer, *QUICK[:-2], "--tensor")

    assert 0 == result.exit_code, result.output
    assert {(3, 32, 32)} == {tuple(request.tensor.shape) for request in peer.requests}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--concurrency", "1", "--rate", "2"), "--concurrency and --rate contradict each other"),
        (("--seconds", "1", "--requests", "2"), "--seconds and --requests contradict each other"),
        (("a.png", "--tensor"), "images and --tensor contradict each other"),
        (("--concurrency", "1,x"), "is not a list such as 1,8,32"),
        (("--rate", "0"), "is not a list such as 5,10,20"),
        (("--synthetic", "640"), "is not WIDTHxHEIGHT"),
        (("-m", "grad-kam"), "did you mean"),
        (("-m", "grad-cam=0"), "is no weight"),
        (("--set", "colour=red"), "sets nothing"),
        (("--json", "no/such/folder/run.json"), "is no folder"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_sent(peer: Peer, arguments: tuple[str, ...], told: str) -> None:
    """Exit status 2, and a server that has heard nothing."""
    result = _bench(peer, *arguments)

    assert (2, []) == (result.exit_code, peer.requests)
    assert told in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--model", "missing"), "no model 'missing'; there are surface"),
        (("-m", "grad-cam@flat"), "refuses to answer grad-cam@flat: LAYER_UNUSABLE"),
    ],
)
def test_what_the_server_cannot_do_is_told_once(peer: Peer, arguments: tuple[str, ...], told: str) -> None:
    """One request finds out, and no load is offered."""
    result = _bench(peer, *QUICK, *arguments)

    assert 1 == result.exit_code
    assert told in result.stderr
    assert len(peer.requests) <= 1


def test_no_server_is_told_briefly() -> None:
    """One line that says what to do."""
    result = CliRunner().invoke(cli.main, ["bench", "--server", "localhost:1", "--timeout", "0.3"])

    assert 1 == result.exit_code
    assert "no camserve at localhost:1" in result.stderr


@pytest.mark.parametrize(
    ("threshold", "code"),
    [
        (("--max-p99-ms", "0.001"), 3),
        (("--max-p99-ms", "20000"), 0),
        (("--fail-above-errors", "0.1"), 3),
        (("--fail-above-errors", "0.5"), 0),
        ((), 0),
    ],
)
def test_thresholds_decide_the_exit_status(peer: Peer, threshold: tuple[str, ...], code: int) -> None:
    """Two of six requests fail; what was missed is told on standard error."""
    full_answer = peer.full_answer
    left = iter(["answer", "fail", "fail"])

    def answer(
        request: explanation_service_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> Iterator[explanation_service_pb2.ExplainResponse]:
        if next(left, "answer") == "fail":
            context.abort(grpc.StatusCode.INTERNAL, "no")
        yield from full_answer(request, context)

    peer.answer = answer
    result = _bench(peer, *QUICK, *threshold)

    assert code == result.exit_code, result.output
    assert bool(code) is ("missed: 2 callers" in result.stderr)
    assert "INTERNAL, told by gRPC itself" in result.stdout


def test_a_server_that_answers_nothing_fails_the_run(peer: Peer) -> None:
    """Also without thresholds."""
    peer.answer = lambda request, context: (
        peer.full_answer(request, context) if len(peer.requests) == 1 else context.abort(grpc.StatusCode.INTERNAL, "no")
    )

    result = _bench(peer, *QUICK)

    assert 1 == result.exit_code
    assert "nothing was answered" in result.stderr
    assert "100.0%" in result.stdout


def test_ctrl_c_tells_what_was_measured(peer: Peer, tmp_path: Path) -> None:
    """The tables and the files are there, marked as stopped, and the exit status is the shell's for an interrupt."""
    full_answer = peer.full_answer
    answered = iter(range(1000))
    assert threading.current_thread() is threading.main_thread()

    def answer(
        request: explanation_service_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> Iterator[explanation_service_pb2.ExplainResponse]:
        if next(answered) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        yield from full_answer(request, context)

    peer.answer = answer
    result = _bench(peer, "--seconds", "60", *QUICK[2:], "--json", str(tmp_path / "run.json"))

    assert 130 == result.exit_code, result.output
    assert "Stopped before the end" in result.stdout
    written = json.loads((tmp_path / "run.json").read_text())
    assert not written["is_complete"]
    assert written["steps"][0]["answered"] >= 5


def test_help_has_examples() -> None:
    """And does not need a server."""
    result = _bench(None, "--help")

    assert 0 == result.exit_code
    assert "camserve bench --rate 5,10,20" in result.stdout


def test_refusals_under_load_are_told_by_reason(peer: Peer) -> None:
    """What the server's door says is in the table."""
    original = peer.full_answer

    def answer(
        request: explanation_service_pb2.ExplainRequest, context: grpc.ServicerContext
    ) -> Iterator[explanation_service_pb2.ExplainResponse]:
        if len(peer.requests) == 1:
            peer.failures.extend([status("RESOURCE_EXHAUSTED", "QUEUE_FULL", "full", retry_after=0.01)] * 2)
        yield from original(request, context)

    peer.answer = answer
    result = _bench(peer, *QUICK)

    assert 0 == result.exit_code, result.output
    assert "RESOURCE_EXHAUSTED QUEUE_FULL" in result.stdout
    assert "33.3%" in result.stdout


def test_other_commands_do_not_wait_for_it() -> None:
    """`camserve --help` lists it without importing it, and it needs neither torch nor the server."""
    script = """
import sys
from click.testing import CliRunner
from camserve.client import cli
assert "Offer load to a server" in CliRunner().invoke(cli.main, ["--help"]).output
assert "camserve.client.bench" not in sys.modules
assert not CliRunner().invoke(cli.main, ["bench", "--help"]).exit_code
assert "camserve.client.bench.command" in sys.modules
wrong = sorted(name for name in sys.modules if name.split(".")[0] == "torch" or name.startswith("camserve.server"))
assert not wrong, wrong
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)  # noqa: S603  # Ours.

    assert 0 == done.returncode, done.stderr
