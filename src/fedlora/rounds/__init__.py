"""A round on the server: plan, uplink, aggregate, cover with noise, advance, record.

Where clients run is the engine's business; how long a run lasts is the session's.
"""
