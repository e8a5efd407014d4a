"""Caching: answers that were given before, for the same request (exact tier) or one that means the same (semantic tier).

Owns: the keys and scopes of entries, both tiers, how long entries live, and the guard against false hits.
Promises: an answer never crosses a tenant, a namespace or a scope; a lookup never fails because a tier is away; memory is bounded.
Refuses: to store what is incomplete, filtered or failed, and to take a caller's word for a looser threshold or a longer life.
"""
