"""Keys and certificates, server and site processes, and a demo federation on one machine.

Nothing in this package trains; it starts the processes that do.
"""
