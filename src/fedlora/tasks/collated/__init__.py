"""The task over rows that are encoded already, and fingerprints of the Python code that it is given.

Nothing here reads a ``Trainer``; ``runs/from_trainer.py`` does.
"""
