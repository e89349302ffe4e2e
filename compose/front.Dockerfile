# The only container that publishes a port: Caddy, out of its own image, or out of Debian's package where the base image lacks it.
ARG BASE_IMAGE=caddy:2
FROM ${BASE_IMAGE}
RUN command -v caddy || { apt-get update && apt-get install -y --no-install-recommends caddy && rm -rf /var/lib/apt/lists/*; }
COPY compose/Caddyfile /etc/caddy/Caddyfile
RUN mkdir -p /data /config && chown -R 10001:10001 /data /config
USER 10001:10001
ENV HOME=/tmp XDG_DATA_HOME=/data XDG_CONFIG_HOME=/config
CMD ["caddy", "run", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"]
