"""The command line.

Commands read, call and print; nothing they call depends on them.
"""
