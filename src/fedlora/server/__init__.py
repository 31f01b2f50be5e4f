"""What the server does with the updates of a cohort: aggregators, server optimisers, pruning.

Parts are values with pure methods; what they remember is passed to them.
"""
