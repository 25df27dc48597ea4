"""From nothing to the embedded model: every command is in README.md."""
