"""Who takes part: partitions of the data, sampling of clients, and tiers.

Nothing here trains or sends.
"""
