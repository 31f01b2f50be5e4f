"""What a site does with a message, and what it stores about its clients.

Nothing here opens a connection.
"""
