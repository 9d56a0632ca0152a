"""The activations that are trained on: from text to shuffled batches, in a place that can be saved."""
