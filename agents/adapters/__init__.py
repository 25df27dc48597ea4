"""Doors for other RL libraries, a file for each; nothing else here imports them."""
