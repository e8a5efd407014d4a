"""`python -m services.batching`: this service in a process of its own."""

from services.batching.app import NAME, open_service
from services.batching.config import Config
from services.runtime.bootstrap import main

main(NAME, Config, open_service)
