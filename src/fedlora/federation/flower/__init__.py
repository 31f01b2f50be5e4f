"""Flower's processes and transport; everything that imports ``flwr`` lives here.

Its modules load no torch unless a client trains in them.
"""
