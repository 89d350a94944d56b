"""Requests of the Open Inference Protocol, drawn: right, or wrong in a place or two. The model is TinyNet's, of 32 pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from camserve.server.oip.messages import ModelInferRequest
from camserve.server.oip.options import OPTIONS
from camserve.server.oip.parameters import parameter
from camserve.server.oip.tensors import DATATYPES

__all__ = ["INTEGERS", "requests"]

INTEGERS = st.integers(-(2**63), 2**63 - 1)
WORDS = st.sampled_from(
    [
        "grad-cam",
        "score-cam",
        "layer",
        "body",
        "stem,body",
        "predicted",
        "{}",
        '{"top":{"k":2}}',
        "float32",
        "png8",
        "true",
        "1",
    ]
)
VALUES = st.one_of(
    st.booleans(),
    INTEGERS,
    st.floats(),
    st.text(max_size=20),
    WORDS,
    st.from_regex(r'\{"[a-z_]{1,9}": .{0,9}\}', fullmatch=True),
)
RIGHT = {
    "method": st.sampled_from(["grad-cam", "layercam", "score-cam", "smoothgrad"]),
    "layer": st.sampled_from(["stem", "body", "stem,body"]),
    "target": st.sampled_from([1, "3", "dog", "predicted", '{"top": {"k": 2}}', '{"kth": {"k": 4}, "score": "rest"}']),
    "score": st.sampled_from(["logit", "softmax"]),
    "format": st.sampled_from(["float32", "float16", "uint8", "png8", "overlay-jpeg"]),
    "size": st.sampled_from(["layer", "input", "source"]),
    "rectify": st.sampled_from([True, "false"]),
    "region_threshold": st.sampled_from([0.5, "0.25"]),
    "samples": st.integers(1, 9),
}
INPUTS = st.sampled_from(
    [
        {"input": ("FP32", (3, 32, 32))},
        {"input": ("UINT8", (2, 3, 32, 32))},
        {"input": ("FP64", (1, 3, 32, 32)), "mask": ("FP32", (1, 2))},
        {"image": ("UINT8", (4, 4, 3)), "mask": ("FP32", (2,))},
        {"mask": ("FP16", (3, 2)), "image": ("UINT8", (3, 4, 5, 1))},
        {"input": ("BF16", (3, 32, 32)), "mask": ("BF16", (2,))},
    ]
)


def _put(draw: st.DrawFn, parameters: Any, strategies: dict[str, Any], *, wrong: bool) -> None:
    """Sets some parameters, rightly or not."""
    names = draw(st.lists(st.sampled_from(sorted(strategies)), max_size=3, unique=True))
    if wrong:
        names.append(draw(st.one_of(st.sampled_from([*OPTIONS, "classification"]), st.text(max_size=4))))
    for name in names:
        value = draw(VALUES if wrong else strategies[name])
        parameters[name].CopyFrom(parameter(value))


@st.composite
def requests(draw: st.DrawFn) -> Any:
    """Requests that are right, or wrong in a place or two."""
    wrong = draw(
        st.sets(
            st.sampled_from(["id", "datatype", "shape", "contents", "outputs", "options", "parameters"]), max_size=2
        )
    )
    made = ModelInferRequest(model_name="tiny", id=draw(st.text(max_size=3)) if "id" in wrong else "id")
    for name, (right_type, right_shape) in draw(INPUTS).items():
        datatype = draw(st.sampled_from([*DATATYPES, "BYTES", "INT32", ""])) if "datatype" in wrong else right_type
        sizes = st.lists(st.one_of(st.integers(0, 4), INTEGERS), max_size=4)
        shape = draw(sizes) if "shape" in wrong else right_shape
        made.inputs.add(name=name, datatype=datatype, shape=shape)
        count = int(np.prod(shape)) if all(0 < size < 99 for size in shape) else draw(st.integers(0, 9))
        size = {"FP64": 8, "FP32": 4, "UINT8": 1}.get(datatype, 2)
        made.raw_input_contents.append(bytes(count * size + ("contents" in wrong)))
    for name in draw(
        st.lists(st.sampled_from(["logits", "heatmap", "heatmap:0", "heatmap:cam"]), max_size=3, unique=True)
    ):
        output = made.outputs.add(name=draw(st.text(max_size=9)) if "outputs" in wrong else name)
        if name != "logits":
            _put(draw, output.parameters, RIGHT, wrong="options" in wrong)
    terms = {
        "priority": st.integers(0, 9),
        "timeout": st.integers(1, 10**9),
        "mine": VALUES,
        "explain.method": RIGHT["method"],
    }
    _put(draw, made.parameters, terms, wrong="parameters" in wrong)
    return made
