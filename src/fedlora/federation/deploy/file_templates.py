"""Templates of the instructions and proxy configuration written by ``fedlora federation init``."""

from __future__ import annotations

PROXY = """\
# A reverse proxy in front of Flower's SuperLink: sites can reach their endpoint only; every other request is refused.
# Put server.pem and server.key at the paths below, then: nginx -c /path/to/nginx.conf
worker_processes auto;
events {{ worker_connections 1024; }}
http {{
  server {{
    listen {proxy_port} ssl;
    server_name {host};
    ssl_certificate server.pem;
    ssl_certificate_key server.key;
    ssl_protocols TLSv1.3;
    client_max_body_size 16m;  # an object of Flower's has 5 MiB at most
    location /v1/fleet/ {{  # the API for SuperNodes; each request is signed with a site's key
      proxy_pass https://127.0.0.1:{port};
      proxy_http_version 1.1;
      proxy_request_buffering off;
      proxy_buffering off;
      proxy_read_timeout 120s;
      proxy_ssl_verify on;
      proxy_ssl_trusted_certificate ca.crt;
      proxy_ssl_name localhost;
    }}
    location / {{ return 403; }}  # the control interface has no password: it must not be reached from outside
  }}
}}
"""

SITE = """\
# This site, and its limits for jobs of the server. Paths are relative to this file.
name = "{name}"
rows = "rows.jsonl"  # csv, tsv, json, jsonl or parquet; they never leave this machine

# [columns]          # name that the task uses = name in the file, where it differs
# text = "body"

# [model]            # where the pre-trained model is here; the same files as the server's
# path = "/models/all-MiniLM-L6-v2"

[limits]             # jobs beyond these are refused; raise them as needed
tunings = ["lora"]           # kinds of tuning; others send more than adapters and the head
max_megabytes = 50           # one message
max_steps = 1000             # one turn
max_seconds = 3600           # one turn, or loading the model
min_cohort = 2               # sites averaged in a round, as the server announces
max_runs = 20                # this and the following: all runs together, across restarts; counted in state/usage.json
max_rounds = 2000
max_megabytes_per_day = 2000
# max_epsilon = 8.0        # of the examples here, at delta = 1e-6; needs noise for examples and dp-accounting
# min_noise = 0.5          # noise that the server declares for the mean of sites
# min_example_noise = 0.5  # noise that this site adds itself
"""

SITE_README = """\
# Site {name}

This folder is private: `site.key` is the identity of this site. Keep it at mode 0600 and do not send it anywhere.

1. `pip install 'fedlora[flower]'`
2. Put your training rows here and name the file in `site.toml`; set your limits there.
3. `fedlora join {host}:{proxy_port} --site-config site.toml`

It waits for the server without a time limit, and reconnects automatically. Ctrl-C leaves.
"""

README = """\
# A federation of {names}

| folder | owner | contents |
| --- | --- | --- |
| `authority/` | you; keep it offline | key that signs certificates; needed again to renew them |
| `server/` | the server | certificate, keys of sites, `server.toml`, `nginx.conf` |
| `sites/NAME/` | one site each; transfer it privately | key, certificate to trust, `site.toml`, a README |

On the server:

1. `pip install 'fedlora[flower]'`
2. `nginx -p "$PWD/server" -c nginx.conf` opens port {proxy_port} to sites. Nothing else may be open: Flower's SuperLink
   listens on 127.0.0.1:{port}, where every admitted client can start runs.
3. A configuration with data `{{ kind = "sites", test = "test.jsonl" }}` and `clients.num` set to the number of
   sites; then `fedlora serve CONFIG.toml --federation server`

On each site: `fedlora join {host}:{proxy_port} --site-config site.toml`, as its README says.

To add a site: `ssh-keygen -t ecdsa -b 384 -N "" -f site.key` on the site, beside copies of another site's `ca.crt`, and
of its `site.toml` with the new name; its public key as `server/sites/NAME.pub`, its name in `server/server.toml`. To
remove one, delete its name there, and lower `min_available`; its key is never accepted again. Both need a restart of
the server.

Certificates last two years; `serve` and `join` warn 30 days before. `fedlora federation renew .` in this folder signs
new ones and says where they are copied.

On one machine, all at once: `fedlora federation demo CONFIG.toml --sites 3`
"""
