"""What comes from outside is data: nothing that a request reaches unpickles or evaluates; few places read model files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SERVER = Path(__file__).resolve().parents[2] / "server/camserve/server"

# Whatever can run code that lies in its argument, by its last name, and by the names before it where that alone says nothing.
RUNS_CODE = {
    "eval", "exec", "__import__", "import_module", "Unpickler", "torch.load", "pickle.load", "pickle.loads", "jit.load",
    "export.load", "numpy.load", "np.load", "marshal.loads", "shelve.open", "load_library", "aoti_load_package", "system",
}  # fmt: skip
# Each reads what an operator put on the server, never what a caller sent.
MAY = {
    "engine/compiled_build.py": {"aoti_load_package"},  # Plans of its own cache.
    "engine/export.py": {"export.load", "import_module"},  # Looked through before; torchvision's operators.
    "engine/export_safety.py": {"torch.load"},  # To see whether a restrained reader takes it.
    "engine/factories.py": {"torch.load", "import_module"},  # weights_only; names on the allow list.
    "engine/script.py": {"jit.load", "import_module"},  # TorchScript's own reader; torchvision's operators.
    "demo/train.py": {"jit.load"},  # What it has just written.
}


def calls(path: Path) -> Iterator[ast.Call]:
    """Every call in a file."""
    return (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))


def code_runners(path: Path) -> set[str]:
    """What in a file can run code."""
    found = set()
    for call in calls(path):
        parts = ast.unparse(call.func).split(".") if isinstance(call.func, ast.Name | ast.Attribute) else []
        # Methods called eval, of a model, are none of Python's.
        if parts in (["eval"], ["exec"]) or (parts and parts[-1] not in {"eval", "exec"}):
            found |= {parts[-1], ".".join(parts[-2:])} & RUNS_CODE
    return found


def test_few_places_can_run_what_they_read() -> None:
    """A new one has to be thought about, and named here."""
    found = {path.relative_to(SERVER).as_posix(): code_runners(path) for path in sorted(SERVER.rglob("*.py"))}

    assert {name: runners for name, runners in found.items() if runners} == MAY


def test_pickles_are_only_read_with_restraint() -> None:
    """torch.load is told weights_only each time, whatever its default is."""
    told = [
        {word.arg: ast.unparse(word.value) for word in call.keywords}.get("weights_only")
        for path in SERVER.rglob("*.py")
        for call in calls(path)
        if ast.unparse(call.func) == "torch.load"
    ]

    assert ["True", "True"] == told


def test_what_parses_requests_loads_nothing_that_could() -> None:
    """In a fresh process the rooms that read messages, images and tensors do not bring along the readers of models."""
    script = (
        "import sys\n"
        "import camserve.server.wire.requests, camserve.server.decode, camserve.server.intake, camserve.server.tensors\n"
        "import camserve.server.image_file, camserve.server.frame\n"
        "wrong = [n for n in sys.modules if n == 'safetensors' or n.startswith('camserve.server.engine')]\n"
        "assert not wrong, wrong\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)  # noqa: S603 - ours

    assert (0, "") == (done.returncode, done.stderr)
