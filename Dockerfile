# syntax=docker/dockerfile:1
# `inward api` without torch; `inward serve` and `worker`, on the processor or on NVIDIA GPUs through vLLM; and the trainer.
#
#   docker build --build-arg VARIANT=api -t inward:0.1.0-api .
#   docker build --build-arg VARIANT=cpu --build-arg TORCH_INDEX=… -t inward:0.1.0-cpu .
#   docker build --build-arg VARIANT=gpu -t inward:0.1.0-gpu .
#   docker build --target trainer -t inward-trainer:0.1.0 .
#
# TORCH_INDEX is PyTorch's index of CPU builds; without it pip fetches several gigabytes of CUDA that a processor has no use for.
#
# What was checked, on a machine without a container engine: hadolint is silent; every COPY source exists; the pip steps of the CPU variant ran in
# this order in a clean environment (Python 3.11), and `inward serve` was healthy with the variables below, as a user who can write to its home and
# to /tmp only (tests/deploy, `make image-check`). Not checked: that an engine builds it, the GPU variant, the trainer.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/srv/inward/bin:$PATH
RUN python -m venv /srv/inward
WORKDIR /src
ARG VARIANT=cpu
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
# Dependencies before sources: they change less often, and are nearly all of the image.
COPY pyproject.toml README.md LICENSE ./
COPY clients/python clients/python
RUN mkdir -p service/inward && touch service/inward/__init__.py
# hadolint ignore=DL3013
RUN case "$VARIANT" in \
      api) pip install ".[otel]" ;; \
      cpu) pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH" && pip install ./clients/python ".[standard,otel]" ;; \
      gpu) pip install ./clients/python ".[vllm,otel]" ;; \
      *) echo "VARIANT is api, cpu or gpu, not $VARIANT" && exit 1 ;; \
    esac
COPY service service
RUN pip install --no-deps --force-reinstall .

FROM python:${PYTHON}-slim-bookworm AS build-trainer
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/srv/inward/bin:$PATH
RUN python -m venv /srv/inward
COPY clients/python /src/python
COPY clients/trainer /src/trainer
RUN pip install /src/python /src/trainer

FROM python:${PYTHON}-slim-bookworm AS base
# gcc: Triton compiles its launchers on the machine that runs them (GPU variant, trainer).
ARG VARIANT=cpu
# hadolint ignore=DL3008
RUN if [ "$VARIANT" = gpu ]; then apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; fi
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/inward inward \
    && mkdir -p /models /heads /adapters \
    && chown inward: /models /heads /adapters
# hadolint ignore=DL3064
ENV PATH=/srv/inward/bin:$PATH \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/lib/inward XDG_STATE_HOME=/var/lib/inward/state HF_HOME=/models/hub MPLCONFIGDIR=/tmp TOKENIZERS_PARALLELISM=false
USER 10001
WORKDIR /var/lib/inward
# All that is ever written is here and in /tmp: the root file system may be read-only.
VOLUME ["/models", "/heads", "/adapters", "/var/lib/inward"]

FROM base AS trainer
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title=inward-trainer org.opencontainers.image.version=$VERSION org.opencontainers.image.licenses=Apache-2.0
COPY --from=build-trainer /srv/inward /srv/inward
ENTRYPOINT ["inward-train"]
CMD ["--help"]

FROM base AS service
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title=inward org.opencontainers.image.version=$VERSION org.opencontainers.image.licenses=Apache-2.0
COPY --from=build /srv/inward /srv/inward
ENV INWARD_HOST=0.0.0.0 INWARD_PORT=8080
EXPOSE 8080
# Alive, not ready: a replica that waits for a worker is well. The first start loads a model.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['INWARD_PORT'] + '/livez', timeout=4)"]
# Python is the first process and heeds SIGTERM: what was accepted is answered, then it exits with 0.
STOPSIGNAL SIGTERM
ENTRYPOINT ["inward"]
CMD ["serve"]
