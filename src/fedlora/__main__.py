"""``python -m fedlora``."""

from fedlora.cli.main import main

main()
