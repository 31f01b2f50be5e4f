"""Flower carries the letters; nothing outside this folder imports it, but for what starts Ray."""
