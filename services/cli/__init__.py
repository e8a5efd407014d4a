"""The `sluice` command: starts and supervises the mesh, and is a client of it for people.

Owns: the embedded topology (one process or seven, NATS, secrets, ports), supervision, the demo, the doctor.
Promises: `up` ends within 15 s of SIGTERM; what it starts dies with it; a crashed service is started again.
Refuses: doing a service's work; it is the one place that may import several services.
"""
