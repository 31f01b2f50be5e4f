"""Messages between servers and sites, and the policies that each side enforces.

Nothing here depends on how messages are carried.
"""
