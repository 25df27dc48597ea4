"""`python -m agents.benchmark`."""

from .command import main

main()
