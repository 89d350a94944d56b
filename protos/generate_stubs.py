"""Build hook: turns `camserve/v1/*.proto` into Python stubs beside them, and `inference/*.proto` into descriptors.

The Open Inference Protocol gets no stubs: they would enter protobuf's default pool, where those of other packages already are,
and two definitions of one name end the process. The server loads the descriptors into a pool of its own.

Called by hatchling for every wheel and editable install, and by `make stubs`. The stubs are never committed. grpcio-tools is
pinned in pyproject.toml because its newest releases write code that refuses protobuf 6.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO_ROOT = Path(__file__).resolve().parent
DESCRIPTORS = PROTO_ROOT.parent / "server" / "camserve" / "server" / "oip" / "open_inference.binpb"


def _site_of(module: str, *, levels: int) -> Path:
    """The folder `levels` above a module: `google` is a namespace of many distributions, so a package has no one path."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{module} is missing; install googleapis-common-protos")
    return Path(spec.origin).parents[levels]


def generate(root: Path = PROTO_ROOT, descriptors: Path = DESCRIPTORS) -> None:
    """Writes `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` for every proto of camserve below `root`, and the other's descriptors.

    Raises:
        RuntimeError: protoc refused a file; its own message is on standard error.
    """
    protos = sorted(str(path.relative_to(root)) for path in root.glob("camserve/**/*.proto"))
    well_known = str(files("grpc_tools") / "_proto")
    google_rpc = str(_site_of("google.rpc.status_pb2", levels=2))
    arguments = ["protoc", f"-I{root}", f"-I{google_rpc}", f"-I{well_known}"]
    arguments += [f"--{kind}_out={root}" for kind in ("python", "pyi", "grpc_python")]
    _run([*arguments, *protos])
    foreign = sorted(str(path.relative_to(root)) for path in root.glob("inference/*.proto"))
    _run(["protoc", f"-I{root}", f"--descriptor_set_out={descriptors}", *foreign])


def _run(arguments: list[str]) -> None:
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"{' '.join(arguments)} failed; see its message above")


class StubsHook(BuildHookInterface[Any]):
    """Runs `generate` before hatchling collects files."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Generates the stubs, whatever kind of build this is."""
        generate()


if __name__ == "__main__":
    sys.exit(generate())
