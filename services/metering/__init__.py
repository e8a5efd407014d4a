"""Metering: who may spend, what is left, and what was spent.

Owns: tenants, projects, keys, budgets, limits, the price book, the journal, usage queries.
Promises: money is integer nano-dollars; a budget is never overshot; an attempt is posted once, however often it is sent; the
journal only grows and its rows prove each other.
Refuses: to lose, double or change an entry; to price anything at a silent zero.
"""
