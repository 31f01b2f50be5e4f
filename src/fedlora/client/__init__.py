"""One client's turn, and the resident model that it uses.

This is the only code that runs on a device; it has no information about other clients.
"""
