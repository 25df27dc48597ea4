"""What few-step models are good for beside sampling: editing without training, and the search of good times."""
