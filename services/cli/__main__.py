"""`python -m services.cli` is `sluice`."""

from services.cli.app import main

main()
