"""`python -m services.routing`: this service in a process of its own."""

from services.routing.app import NAME, open_service
from services.routing.config import Config
from services.runtime.bootstrap import main

main(NAME, Config, open_service)
