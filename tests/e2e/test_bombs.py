"""Small files and messages that would become gigabytes: the server refuses them, or stays within what it reckoned with."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from PIL import Image
from support.held import Held, held_process

from camserve.client import Client, TensorInput
from camserve.v1 import explanation_service_pb2 as service_pb2
from camserve.v1 import input_pb2

ROW = TensorInput(np.zeros((3, 32, 32), np.float32))
EXPLAIN = "/camserve.v1.ExplanationService/Explain"
# A machine that does a hundred other things may take its time; one that unpacks gigabytes takes longer.
SECONDS = 60.0
# What any request may cost beside its picture: buffers, a thread's first arena.
SMALL = 24 << 20


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    """A server with the limits that it has by itself."""
    with held_process(tmp_path_factory.mktemp("held")) as held:
        yield held


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    """A file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(*chunks: bytes, side: int = 8, pixels: bytes | None = None) -> bytes:
    """A gray PNG file with further chunks before its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes(side * (side + 1))) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """So many, compressed to a thousandth."""
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    whole, rest = divmod(count, len(block))
    return b"".join(packer.compress(block) for _ in range(whole)) + packer.compress(block[:rest]) + packer.flush()


def tiff(entries: dict[int, tuple[int, int]]) -> bytes:
    """A TIFF file of one directory: tag to type and value."""
    packed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)


def resized(file: bytes, find: bytes, put: bytes) -> bytes:
    """The file with another size in its header."""
    assert 1 <= file.count(find)
    return file.replace(find, put, 1)


HUGE = 256 << 20
LARGEST_MESSAGE = 64 << 20
SMALL_JPEG = saved(Image.new("L", (24, 16)), "JPEG")
TILED = {256: (4, 64), 257: (4, 64), 258: (3, 8), 259: (3, 1), 262: (3, 1), 277: (3, 1), 324: (4, 8), 325: (4, 64)}
# What makes it, what is said, and how much more memory it may take.
BOMBS: dict[str, tuple[Callable[[], bytes], str, int]] = {
    "PNG of 10 gigapixels": (lambda: png(side=100_000, pixels=zeros(1 << 20)), "IMAGE_TOO_LARGE", SMALL),
    "JPEG of 4 gigapixels": (
        lambda: resized(SMALL_JPEG, struct.pack(">HH", 16, 24), struct.pack(">HH", 65_500, 65_500)),
        "IMAGE_TOO_LARGE",
        SMALL,
    ),
    "BMP of 4 exapixels": (
        lambda: resized(saved(Image.new("L", (24, 16)), "BMP"), struct.pack("<ii", 24, 16), b"\xff\xff\xff\x7f" * 2),
        "IMAGE_TOO_LARGE",
        SMALL,
    ),
    "WebP canvas of 268 megapixels": (
        lambda: b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\x3f\0" * 2,
        "IMAGE_TOO_LARGE",
        SMALL,
    ),
    "TIFF tile of 3 gigapixels": (
        lambda: tiff({**TILED, 322: (4, 60_000), 323: (4, 60_000)}),
        "IMAGE_TOO_LARGE",
        SMALL,
    ),
    "JPEG of a thousand scans": (
        lambda: (
            (file := saved(Image.new("L", (2048, 2048)), "JPEG", progressive=True))[:-2]
            + file[file.rindex(b"\xff\xda") : -2] * 1000
            + file[-2:]
        ),
        "IMAGE_UNDECODABLE",
        SMALL,
    ),
    "GIF of 4 gigapixels": (lambda: b"GIF89a\xff\xff\xff\xff\0\0\0", "IMAGE_UNDECODABLE", SMALL),
    # Metadata is either looked at as it is, packed, or not unpacked beyond what its reader allows.
    "PNG with 256 MB of text": (lambda: png(chunk(b"zTXt", b"a\0\0" + zeros(HUGE))), "", 64 << 20),
    "PNG with 256 MB of profile": (lambda: png(chunk(b"iCCP", b"a\0\0" + zeros(HUGE))), "", 64 << 20),
    "PNG with 256 MB behind its last row": (lambda: png(pixels=zeros(HUGE)), "", SMALL),
    # As large as is taken: within what the door reckons, ten and eighteen bytes a pixel.
    "PNG of 49 megapixels": (lambda: png(side=7000, pixels=zeros(7000 * 7001)), "", 490 << 20),
    "TIFF of 49 megapixels": (
        lambda: saved(Image.new("L", (7000, 7000)), "TIFF", compression="tiff_adobe_deflate"),
        "",
        882 << 20,
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb(held: Held, name: str):
    """It is refused, or answered, within a minute and within the memory that its pixels may take; then the next is answered."""
    make, reason, most = BOMBS[name]
    data = make()
    request = service_pb2.ExplainRequest(model="held", image=input_pb2.EncodedImage(data=data)).SerializeToString()
    with Client(held.served.target, retries=0) as client:
        client.explain(ROW, model="held")
        before = held.process.resident_bytes()
        held.process.forget_peak()
        code, said = ended(held, request)
        grown = held.process.peak_bytes() - before
        client.explain(ROW, model="held", specs=["grad-cam"])

    print(f"\n{name}, {len(data)} bytes: {code} {said[:90]}, {grown / 2**20:.0f} MiB")  # noqa: T201 - told in docs
    assert grown <= most
    if reason:
        assert ("INVALID_ARGUMENT", True) == (code, reason in said), said
    else:
        assert code in {"OK", "INVALID_ARGUMENT"}


def ended(held: Held, request: bytes, call: str = EXPLAIN, **options: object) -> tuple[str, str]:
    """Code of a call, and what was said: message and details."""
    with grpc.insecure_channel(held.served.target) as channel:
        try:
            list(channel.unary_stream(call)(request, timeout=SECONDS, **options))
        except grpc.RpcError as error:
            details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
            return error.code().name, f"{error.details()} {details.decode(errors='replace')}"
        return "OK", ""


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_message(held: Held, algorithm: grpc.Compression):
    """A message of 256 kB that would unpack to 256 MB is unpacked as far as the largest message, and refused."""
    before = held.process.resident_bytes()
    held.process.forget_peak()
    code, said = ended(held, bytes(HUGE), compression=algorithm)
    grown = held.process.peak_bytes() - before

    print(f"\n{algorithm}: {code} {said[:90]}, {grown / 2**20:.0f} MiB")  # noqa: T201 - told in docs
    assert ("RESOURCE_EXHAUSTED", True) == (code, "larger than max" in said)
    assert grown <= LARGEST_MESSAGE + SMALL


@pytest.mark.parametrize(
    ("call", "unit"),
    [
        pytest.param(EXPLAIN, b"\x4a\x00", id="specs"),
        pytest.param("/inference.GRPCInferenceService/ModelInfer", b"\x2a\x00", id="inputs"),
    ],
)
def test_message_of_many_empty_parts(held: Held, call: str, unit: bytes):
    """Tens of millions of submessages of two bytes are counted, as far as need be, and not made: that would take gigabytes."""
    message = unit * (60 << 19)
    before = held.process.resident_bytes()
    held.process.forget_peak()
    code, said = ended(held, message, call)
    grown = held.process.peak_bytes() - before

    print(f"\n{len(message)} bytes: {code} {said[:90]}, {grown / 2**20:.0f} MiB")  # noqa: T201 - told in docs
    assert ("INVALID_ARGUMENT", True) == (code, "more than 20000 fields" in said)
    # gRPC holds it as it was received, joined, and as Python's bytes.
    assert grown <= 3 * len(message) + SMALL
