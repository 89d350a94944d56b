"""The Open Inference Protocol, version 2, in front of the pipeline that `camserve.v1` is in front of as well.

`servicer.py` answers the protocol's calls: requests become the same `Job`s, events the protocol's replies. Nothing is scheduled,
queued or measured here. The messages live in a descriptor pool of their own (`messages.py`), since other packages bring theirs
into protobuf's default one. docs/open-inference.md is what callers read.
"""
