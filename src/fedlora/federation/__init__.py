"""A federation over several machines: certificates and keys, the server, the sites, a trial on one machine."""
