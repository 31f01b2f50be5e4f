"""How the server processes a cohort's updates: aggregators, server optimisers, pruning.

Parts are values with pure methods; their state is passed in as an argument.
"""
