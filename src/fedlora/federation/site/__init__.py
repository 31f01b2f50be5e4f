"""A site's message handling, and its storage of client state.

Nothing in this package opens a connection.
"""
