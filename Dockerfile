# The image of a camserve server.
#   docker build -t camserve .                                  torch's CUDA build; runs on CPU too
#   docker build -t camserve --build-arg TORCH_BACKEND=cpu .    gigabytes smaller; CPU only
#   docker run -p 127.0.0.1:50051:50051 -e CAMSERVE_ALLOW_ANONYMOUS=true camserve    the shipped demo model, for this machine
#   docker run --gpus all -p 50051:50051 -v "$PWD/models:/models:ro" -v "$PWD/secrets:/secrets:ro" \
#     -e CAMSERVE_CALLERS=/secrets/callers.toml -e CAMSERVE_TLS_CERTIFICATE=/secrets/server.pem \
#     -e CAMSERVE_TLS_KEY=/secrets/server.key camserve        uid 10001 has to be able to read them
# TORCH_BACKEND takes what uv's --torch-backend takes: cpu, or a CUDA release for older drivers, such as cu126.

ARG PYTHON_IMAGE=python:3.13.16-slim-trixie

# Builds the environment; compilers, pip and uv stay behind here.
FROM ${PYTHON_IMAGE} AS build

ARG UV_VERSION=0.13.8
ARG TORCH_BACKEND=""
ENV UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never \
    VIRTUAL_ENV=/opt/camserve

RUN python -m pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore "uv==${UV_VERSION}" \
    && uv venv "${VIRTUAL_ENV}"

# Dependencies first: this layer is the large one, and it outlives changes to the source.
WORKDIR /source
COPY pyproject.toml ./
RUN uv pip install --no-cache ${TORCH_BACKEND:+--torch-backend "${TORCH_BACKEND}"} --requirements pyproject.toml --extra server --extra tracing

COPY LICENSE README.md ./
COPY protos protos
COPY server server
COPY client client
RUN uv build --no-cache --wheel --out-dir /wheels \
    && uv pip install --no-cache --no-deps --compile-bytecode /wheels/*.whl

FROM ${PYTHON_IMAGE} AS runtime

RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin camserve

COPY --from=build /opt/camserve /opt/camserve
COPY --chmod=0755 deploy/container/start deploy/container/healthcheck.py /usr/local/lib/camserve/

# Logs for machines; a file system that is read-only except for /tmp is enough.
# Within a container, loopback is reached by nobody; so the server asks for callers or for CAMSERVE_ALLOW_ANONYMOUS.
ENV CAMSERVE_LISTEN=0.0.0.0:50051 \
    CAMSERVE_LOG_FORMAT=json \
    HOME=/tmp \
    PATH=/opt/camserve/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# By number, so that Kubernetes can tell it is not root.
USER 10001:10001
WORKDIR /tmp
EXPOSE 50051 8002
STOPSIGNAL SIGTERM

# Alive, not ready: whoever restarts what is unhealthy must not do so while models load or requests are finished.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "/usr/local/lib/camserve/healthcheck.py"]

ENTRYPOINT ["/usr/local/lib/camserve/start"]
CMD ["camserve", "serve"]
