"""Files of a run: what is saved, checkpoints, which of them are whole."""
