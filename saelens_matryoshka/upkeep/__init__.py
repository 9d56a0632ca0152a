"""What keeps the state of a training run, whatever it trains: checkpoints, and when they are written."""
