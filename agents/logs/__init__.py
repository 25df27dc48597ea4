"""What a run writes down: scalars, diagnostics, pictures."""
