"""Pre-trained models: loading, heads, pooling, and forward passes over sequences of unequal length.

Nothing here reads rows or computes a metric.
"""
