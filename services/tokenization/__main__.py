"""`python -m services.tokenization`: this service in a process of its own."""

from services.runtime.bootstrap import main
from services.tokenization.app import NAME, open_service
from services.tokenization.config import Config

main(NAME, Config, open_service)
