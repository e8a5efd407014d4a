"""The HTTP edge of the gateway: the OpenAI and the Anthropic spelling of the public API over one core.

Owns: the HTTP/1.1 protocol, its limits in time and size, the translation of both JSON dialects, the shape of errors.
Promises: a request is answered or refused by name of what is wrong; no field of a request is dropped in silence; a caller that goes
away cancels its request; memory is bounded whatever arrives.
Refuses: decisions. Who may do what, where it runs and what it costs is the core's business.
"""
