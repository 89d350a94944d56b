from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import sys
import {module}
wrong = sorted(name for name in sys.modules if name.split(".")[0] == "torch" or name.startswith("camserve.server"))
assert not wrong, wrong
"""


@pytest.mark.parametrize("module", ["camserve.client", "camserve.client.cli", "camserve.client.report"])
def test_the_client_imports_neither_torch_nor_the_server(module: str) -> None:
    """It must install and start light."""
    done = subprocess.run(  # noqa: S603  # Our own script in our own interpreter.
        [sys.executable, "-c", _SCRIPT.format(module=module)], capture_output=True, text=True, check=False
    )

    assert 0 == done.returncode, done.stderr
