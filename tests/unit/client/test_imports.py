from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import sys
import camserve.client, camserve.client.cli, camserve.client.report
wrong = sorted(name for name in sys.modules if name.split(".")[0] == "torch" or name.startswith("camserve.server"))
assert not wrong, wrong
"""


def test_the_client_imports_neither_torch_nor_the_server() -> None:
    """It must install and start light."""
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=False)  # noqa: S603  # Ours.

    assert 0 == done.returncode, done.stderr
