"""`python -m services.caching`: this service in a process of its own."""

from services.caching.app import NAME, open_service
from services.caching.config import Config
from services.runtime.bootstrap import main

main(NAME, Config, open_service)
