# Everything a person or CI does here. Needs Python >= 3.11, git and make; the rest is put into .venv.
#   make demo    explain the sample images with the shipped model and write report/report.html
#   make test    the suite          make test-slow   the long suites
#   make check   format, lint, types, protos, import rules
#   make serve   a server on port 50051 with the demo model
#   make bench   the benchmarks          make bench-peers   only the one beside other servers
#   make clients the clients of other servers, each in an environment of its own, for the tests that use them
#   make soak    two hours of mixed load, or SOAK_SECONDS, and whether the server is afterwards what it was
#   make docs    docs/methods.md and docs/pictures, written from the code
#   make wheelhouse   camserve[server,tracing] and all it needs as wheels in build/wheelhouse, for machines without internet
# TORCH_BACKEND=cpu (or cu128, auto …) picks the torch build, for machines without a GPU.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH_BACKEND ?=
PEERS := build/peers/.installed
PEERS_OPTIONS ?=
SOAK_OPTIONS ?=
CLIENTS := build/clients
PROTOS := $(wildcard protos/camserve/v1/*.proto protos/inference/*.proto)

.PHONY: demo test test-slow check format serve bench bench-peers clients soak docs wheelhouse stubs train clean

# uv from the machine if it is there, else from PyPI into the environment.
$(INSTALLED): pyproject.toml protos/generate_stubs.py $(PROTOS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null || test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	PATH="$(abspath $(BIN)):$$PATH" VIRTUAL_ENV="$(abspath $(VENV))" uv pip install --quiet \
		$(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND)) --editable '.[server,dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/camserve demo --out report

test: $(INSTALLED)
	$(BIN)/pytest

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow --timeout 3600

check: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	@mkdir -p build/googleapis/google && cp -r "$$($(BIN)/python -c 'import google.rpc.status_pb2 as m, os; print(os.path.dirname(m.__file__))')" build/googleapis/google/
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code protos

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/buf format --write protos

serve: $(INSTALLED)
	$(BIN)/camserve serve

bench: $(INSTALLED)
	OMP_NUM_THREADS=$$(nproc) $(BIN)/pytest tests/benchmarks -m benchmark -s
	$(MAKE) bench-peers

# The other servers live in an environment of their own, with the same torch. The quick form is
#   make bench-peers PEERS_OPTIONS='--rounds 1 --seconds 4 --concurrency 8'
$(PEERS): tests/benchmarks/peers/requirements.txt $(INSTALLED)
	rm -rf build/peers
	PATH="$(abspath $(BIN)):$$PATH" uv venv --quiet --python $(BIN)/python build/peers/env
	PATH="$(abspath $(BIN)):$$PATH" VIRTUAL_ENV="$(abspath build/peers/env)" uv pip install --quiet \
		$(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND)) --requirement $< \
		"torch==$$($(BIN)/python -c 'import importlib.metadata as m; print(m.version("torch"))')"
	@touch $@

bench-peers: $(PEERS)
	PYTHONPATH=tests $(BIN)/python -m benchmarks.peers $(PEERS_OPTIONS)

# What tests/e2e/test_standard_clients.py talks with; Node and npm come from the machine. `.installed` is written last, so that an
# installation that was broken off, or cannot be imported, counts as none.
IMPORTED_tritonclient := tritonclient.grpc.aio
IMPORTED_kserve := kserve
clients: $(CLIENTS)/tritonclient/.installed $(CLIENTS)/kserve/.installed $(CLIENTS)/node/.installed

$(CLIENTS)/tritonclient/.installed $(CLIENTS)/kserve/.installed: $(CLIENTS)/%/.installed: tests/clients/%/requirements.txt $(INSTALLED)
	rm -rf $(@D)
	PATH="$(abspath $(BIN)):$$PATH" uv venv --quiet --python $(BIN)/python $(@D)
	PATH="$(abspath $(BIN)):$$PATH" VIRTUAL_ENV="$(abspath $(@D))" uv pip install --quiet --requirement $<
	PYTHONPATH= PYTHONDONTWRITEBYTECODE= $(@D)/bin/python -c 'import $(IMPORTED_$*)'
	@touch $@

$(CLIENTS)/node/.installed: tests/clients/node/package.json
	rm -rf $(@D)
	mkdir -p $(@D)
	cp $< $(@D)
	cd $(@D) && npm install --silent --no-package-lock --no-audit --no-fund --no-update-notifier --ignore-scripts
	@touch $@

# A quarter of an hour is SOAK_SECONDS=900 make soak; on a machine that does nothing else, SOAK_OPTIONS='--most-drift 0.05'.
soak: $(INSTALLED)
	PYTHONPATH=tests $(BIN)/python -W ignore -m soak $(SOAK_OPTIONS)

docs: $(INSTALLED)
	$(BIN)/python -W ignore -m camserve.server.reference.page docs
	$(BIN)/python -W ignore -m camserve.server.reference.pictures docs/pictures

# For this Python and platform. pip's own variables choose the index, and so the torch build: see docs/operations.md.
wheelhouse: $(INSTALLED)
	rm -rf build/wheelhouse
	$(BIN)/python -m pip wheel --wheel-dir build/wheelhouse '.[server,tracing]'
	@echo "On the other machine: pip install --no-index --find-links build/wheelhouse 'camserve[server]'"

train: $(INSTALLED)
	$(BIN)/python -m camserve.server.demo.train

stubs: $(INSTALLED)
	$(BIN)/python protos/generate_stubs.py

clean:
	rm -rf $(VENV) build dist report
