"""From a gradient to new weights: optimizers, checks, averages, many processes."""
