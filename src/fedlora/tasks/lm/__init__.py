"""Causal language modelling and instruction tuning, with generated answers.

Nothing here serves a task that has classes.
"""
