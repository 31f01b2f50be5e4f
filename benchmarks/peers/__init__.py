"""The same job trained by fedlora and by other systems, side by side: ``python -m benchmarks.peers``."""
