"""Data sources, and the column names that tasks expect.

Nothing here depends on the model that reads the rows.
"""
