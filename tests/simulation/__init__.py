"""A deterministic simulation of money: admit, hold, execute, settle under one seed. `python -m tests.simulation --help`.

The objects of the product are real: the gateway's core with its leases, holds and flights, execution's attempts and spool, metering's
servicer, leasing and SQLite statements. Around them everything is made of the seed: the order in which processes get a turn, the clock,
the network between them, the disk, the provider. A process can be killed wherever it waits, and in the middle of a write; what it was
doing is then gone, and it starts again from what is on disk.

    universe    the clock, the processes' event loops, and who gets the next turn
    disk        files in memory, with writes that fail and processes that die in them
    store       the SQLite store, its writer's turns given by the loop
    network     calls between processes that are lost, doubled, late or cut off
    vendor      a provider that keeps its own bill
    peers       routing, tokenization and caching, as far as the gateway asks them
    nodes       the wiring of one process
    world       one seed: the faults, the callers, the end
    checks      what must hold
    mutations   bugs to plant, which the simulation must find
"""
