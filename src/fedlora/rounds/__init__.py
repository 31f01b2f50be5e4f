"""A round on the server: plan, uplink, aggregate, cover with noise, advance, record.

The engine decides where clients run, the session how many rounds there are.
"""
