"""Parts of one's own for fedlora."""
