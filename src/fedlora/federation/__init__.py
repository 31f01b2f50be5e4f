"""Federated training across machines: protocol, sites, servers, Flower, deployment.

Methods do not know that this folder exists; only ``flower`` and what starts it import Flower.
"""
