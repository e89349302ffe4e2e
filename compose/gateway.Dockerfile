# The gateway: HTTP and text, without torch.
ARG BASE_IMAGE=python:3.12-slim-bookworm
FROM ${BASE_IMAGE}
RUN python3 -m venv /opt/baton
ENV PATH=/opt/baton/bin:$PATH PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
WORKDIR /baton
COPY constraints.txt ./
RUN pip install --no-cache-dir --disable-pip-version-check -c constraints.txt \
      httptools Jinja2 msgspec prometheus_client pyzmq redis starlette tokenizers transformers uvicorn uvloop \
 && pip uninstall -q -y pip
COPY common common
COPY gateway gateway
RUN python -m compileall -q common gateway
USER 10001:10001
ENV HOME=/tmp
CMD ["python", "-m", "gateway"]
