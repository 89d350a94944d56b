"""Protobuf in, jobs out; events in, protobuf out. With `service.py` and `interceptors.py` the only rooms that see camserve.v1."""
