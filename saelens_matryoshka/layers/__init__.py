"""Many dictionaries from one forward pass of the language model, trained in lockstep."""

from saelens_matryoshka.layers.lockstep import LockstepTrainer, train_layers
from saelens_matryoshka.layers.store import ManyHookStore

__all__ = ["LockstepTrainer", "ManyHookStore", "train_layers"]
