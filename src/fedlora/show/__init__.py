"""What users see of a run: tables, plots, descriptions.

Nothing here changes a run.
"""
