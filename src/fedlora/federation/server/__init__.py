"""Clients on remote sites: pending jobs, retries, timeouts and rejected replies.

Nothing in this package imports Flower; messages go through a transport that is passed in.
"""
