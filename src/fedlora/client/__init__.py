"""One client's turn, and the resident model that it is taken with.

This is the only code that a device runs; it knows nothing about other clients.
"""
