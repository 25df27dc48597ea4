"""The training loop that all algorithms share, and its two kinds: policy gradients and regression."""
