"""Extractive question answering: passages, spans and their scores.

Nothing here serves another task.
"""
