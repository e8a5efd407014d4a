"""Batching: requests that run later.

Owns: the job table, the queues on JetStream, workers, retries, dead letters, fairness between tenants.
Promises: an accepted job is durable, runs at least once, ends in exactly one final state, and is charged once per attempt id.
Refuses: to accept a job that isn't durable: without NATS a submit is UNAVAILABLE, and a full queue is a clear error.
"""
