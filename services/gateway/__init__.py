"""The gateway: the public API of Sluice.

Owns: authentication, admission, the order of calls, holds taken from leases, response formatting and streaming.
Promises: one charge per request id, no spending beyond what metering granted, one typed error per failed call, the caller's
deadline kept across every step.
Refuses: durable state. What it remembers is a cache of what metering and routing said, and can be lost at any moment.
"""
