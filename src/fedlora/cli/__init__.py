"""The command line.

Commands read configurations, call the library and print results; the library does not depend on them.
"""
