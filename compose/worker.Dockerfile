# Prefill, decode and colocated workers, and the service that puts the model into the volume.
ARG BASE_IMAGE=python:3.12-slim-bookworm

# The CPU kernels, for every kind of x86-64; the image that runs has no g++. Another architecture computes with torch.
FROM ${BASE_IMAGE} AS kernels
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY services/__init__.py services/__init__.py
COPY services/engine/__init__.py services/engine/__init__.py
COPY services/engine/native services/engine/native
RUN mkdir /kernels && if [ "$(uname -m)" = x86_64 ]; then python3 -m services.engine.native /kernels; fi

FROM ${BASE_IMAGE}
# Triton compiles what launches its kernels on a GPU with gcc, and there is no other way.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# pip: UCX out of its wheel (shared memory, CUDA, TCP). system: the base image's own UCX, or else Debian's, for verbs.
ARG UCX=pip
RUN if [ "$UCX" = system ] && ! ldconfig -p | grep -q libucp; then \
      apt-get update && apt-get install -y --no-install-recommends libucx0 ibverbs-providers && rm -rf /var/lib/apt/lists/*; \
    fi
RUN python3 -m venv /opt/baton
ENV PATH=/opt/baton/bin:$PATH PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
WORKDIR /baton
COPY constraints.txt ./
# An index of wheels to look at besides, where it answers: without CUDA torch is a tenth as large.
ARG TORCH_INDEX=
RUN extra="" \
 && if [ -n "$TORCH_INDEX" ] && python -c "import sys, urllib.request as u; u.urlopen(sys.argv[1] + '/torch/', timeout=5)" "$TORCH_INDEX"; then \
      extra="--extra-index-url $TORCH_INDEX"; \
    fi \
 && pip install --no-cache-dir --disable-pip-version-check -c constraints.txt $extra \
      accelerate gguf huggingface_hub msgspec numpy nvidia-ml-py prometheus_client pyzmq redis safetensors torch transformers ucxx-cu13 uvloop xxhash
COPY common common
COPY services services
COPY scripts scripts
COPY --from=kernels /kernels /opt/baton/kernels
RUN python -m compileall -q common services scripts \
 && mkdir /models && chown 10001:10001 /models
USER 10001:10001
ENV HOME=/tmp XDG_CACHE_HOME=/models HF_HOME=/models/hub BATON_KERNELS_FOLDER=/opt/baton/kernels
