"""Values and arithmetic that everything else is built from: trees, schemas, stores, seeds, files.

Nothing here knows about methods, models or machines, and nothing here imports another folder.
"""
