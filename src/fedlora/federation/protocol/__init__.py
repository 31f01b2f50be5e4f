"""Messages between servers and sites, and the policies that each side enforces.

Nothing in this package depends on how messages are transported.
"""
