"""Training runs: their settings, their folders, and what starts and continues them."""
