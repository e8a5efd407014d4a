"""The engines behind the ports of the caching service."""
