"""Training runs: their settings, folders and checkpoints."""
