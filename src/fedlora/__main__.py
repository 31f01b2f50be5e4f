"""``python -m fedlora``."""

from fedlora.cli import main

main()
