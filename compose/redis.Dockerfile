# Valkey out of its own image, or Debian's Redis where the base image has neither.
ARG BASE_IMAGE=valkey/valkey:8
FROM ${BASE_IMAGE}
RUN command -v valkey-server || command -v redis-server \
 || { apt-get update && apt-get install -y --no-install-recommends redis-server && rm -rf /var/lib/apt/lists/*; }
COPY compose/redis-start /usr/local/bin/redis-start
RUN mkdir -p /data /run/baton && chown -R 10001:10001 /data /run/baton
USER 10001:10001
WORKDIR /data
ENTRYPOINT []
CMD ["redis-start"]
