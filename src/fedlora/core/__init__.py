"""The basic values and arithmetic: trees, schemas, stores, seeds, files.

Nothing here depends on methods, models or machines, and nothing here imports another folder.
"""
