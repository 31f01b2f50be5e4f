"""Presentation of runs: tables, plots, descriptions.

Nothing in this package affects a run.
"""
