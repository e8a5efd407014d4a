"""Execution: the connections to providers.

Owns: upstream connections, attempts, circuit breakers, normalised errors and usage, the spool of settlements.
Promises: every attempt has an id and a record before it is sent, and is settled exactly once, whatever crashes; candidates change
freely before the first token and never after it; cancelling a call closes the provider's socket.
Refuses: to retry a paid call without recording the attempt; to show a credential.
"""
