"""The files of a run: saving, loading and checkpoints, and the manifests that tell which of them are whole."""
