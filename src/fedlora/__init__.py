"""fedlora."""
