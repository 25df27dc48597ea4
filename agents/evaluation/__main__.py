"""The command `python -m agents.evaluation RUN`."""

from .command import main

main()
