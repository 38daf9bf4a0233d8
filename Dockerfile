# syntax=docker/dockerfile:1
# An image for clusters that want one: CUDA's runtime, and what `make setup` installs, of the lock and nothing else.
# docker build -t registry.example.com/qvl-pipeline:latest .
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# git: a run records its commit. The versions are those of the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Not root: what is written into shared folders belongs to a person.
RUN useradd --create-home --uid 10001 trainer && install -d -o trainer -g trainer /project
USER trainer
WORKDIR /project
ENV VIRTUAL_ENV=/home/trainer/venv PATH=/home/trainer/venv/bin:$PATH PYTHONUNBUFFERED=1

# The lock first: it changes less often than the code.
COPY --chown=trainer:trainer requirements.lock ./
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install --no-cache-dir --requirement requirements.lock
COPY --chown=trainer:trainer . .
RUN pip install --no-cache-dir --no-deps --editable .

# `exec` form: signals reach kedro, which ends the step and saves.
ENTRYPOINT ["kedro"]
CMD ["run"]
