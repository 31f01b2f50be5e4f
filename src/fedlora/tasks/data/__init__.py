"""Data sources, and the column names that tasks expect.

Nothing here knows which model reads the rows.
"""
