"""`python -m services.metering`: this service in a process of its own."""

from services.metering.app import NAME, open_service
from services.metering.config import Config
from services.runtime.bootstrap import main

main(NAME, Config, open_service)
