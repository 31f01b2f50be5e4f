"""A run and its folder: sessions, results, evaluation, exports, communication estimates.

Nothing in this package affects the computations of a round.
"""
