"""Runs the gateway as a process of its own: `python -m services.gateway`."""

from services.gateway.app import NAME, open_service
from services.gateway.config import Config
from services.runtime.bootstrap import main

if __name__ == "__main__":
    main(NAME, Config, open_service)
