"""Flower's processes and transport; everything that imports ``flwr`` is in this package.

Its modules do not import torch unless a client trains in them.
"""
