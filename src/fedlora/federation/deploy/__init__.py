"""Keys and certificates, servers and sites as processes, and a trial on one machine.

Nothing here trains; it starts the processes that do.
"""
