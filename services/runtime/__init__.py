"""How a process of the mesh behaves: bootstrap, transports, interceptors, config, telemetry. Knows no domain.

Owns: one call surface for three transports (gRPC, link, in-process), errors with reasons, deadlines, health and drain.
Promises: a servicer sees the same request, deadline, metadata, caller and errors whichever transport brought the call.
Refuses: domain knowledge; it imports no service.
"""
