"""Federated training across machines: protocol, sites, servers, Flower, deployment.

Methods do not depend on this package; only ``flower`` and the modules that start it import Flower.
"""
