"""The services of the mesh, one package each; `runtime` is how a process behaves, `cli` wires several into one."""

__version__ = "0.1.0"
