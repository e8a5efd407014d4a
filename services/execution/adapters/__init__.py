"""Providers by wire format, and the connections under them."""
