"""Measurements of fedlora's speed, memory and bytes; see ``README.md`` in this folder."""
