"""The logs of a run: scalars, diagnostics, pictures."""
