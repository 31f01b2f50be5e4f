"""A run and its folder: sessions, results, evaluation, exports, communication estimates.

Nothing here changes the arithmetic of a round.
"""
