"""Functions that write tiny checkpoints of every layout."""
