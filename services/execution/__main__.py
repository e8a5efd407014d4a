"""`python -m services.execution`: this service in a process of its own."""

from services.execution.app import NAME, open_service
from services.execution.config import Config
from services.runtime.bootstrap import main

main(NAME, Config, open_service)
