"""An activation store that can be continued: the batch after a restart is the one it would have been.

SAELens's store saves how many documents it has read. The next batch depends on more: on the rows in the
mixing buffer and those shuffled but not yet served, on the tokens of a document that are not used yet, on the
random state that will shuffle the next ones, and, with prefetching, on the batches that wait in the queue.
`ResumableStore` saves all of it, in SAELens's own file, so that SAELens's own `resume_from_checkpoint`
continues exactly as well. The price is the size of the buffer:
`n_batches_in_buffer × context_size × (d_in [+ d_out]) × bytes per value`.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.training.prefetch import PrefetchingIterator
from safetensors import safe_open
from safetensors.torch import save_file
from typing_extensions import override

from saelens_matryoshka.mixing import MixingBuffer
from saelens_matryoshka.random_state import random_state, set_random_state
from saelens_matryoshka.seams import OpenStore
from saelens_matryoshka.token_stream import Position, TokenStream

_METADATA_KEY = "saelens_matryoshka"


class ResumableStore(OpenStore):
    """SAELens's `ActivationsStore`, which streams the same batches, with a place that can be saved.

    `save_to_checkpoint` and `load_from_checkpoint` may be called at any time between two batches, also while
    a prefetcher's thread asks for more.
    """

    iterable_sequences: TokenStream

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._lock = threading.RLock()
        self._buffer: MixingBuffer[Position] | None = None
        self._ahead: deque[torch.Tensor] = deque(maxlen=0)
        super().__init__(*args, **kwargs)

    # ---- streaming

    @override
    def sequences(self) -> TokenStream:
        return TokenStream(self)

    @override
    def get_data_loader(self) -> MixingBuffer[Position]:
        return MixingBuffer(
            ((rows, self._position()) for rows in self.filtered_activations()),
            buffer_size=self.n_batches_in_buffer * self.training_context_size,
            batch_size=self.train_batch_size_tokens,
            mix_fraction=self.activations_mixing_fraction,
            start=self._position(),
        )

    @override
    def __next__(self) -> torch.Tensor:
        with self._lock:
            if self._buffer is None:
                self._buffer = self.get_data_loader()
            batch = next(self._buffer)
            self._ahead.append(batch)
            return batch

    def _position(self) -> Position:
        if self.cached_activation_dataset is not None:
            return Position(cached_row=self.current_row_idx)
        return self.iterable_sequences.position()

    # ---- prefetching

    def expect_prefetching(self, n_batches: int) -> None:
        """Keep track of the batches that a prefetcher with a queue of `n_batches` has taken ahead."""
        # one more is in the hand of its thread, and one in that of the trainer
        self._ahead = deque(self._ahead, maxlen=n_batches + 2)

    def is_next(self, batch: torch.Tensor) -> bool:
        """Whether a prefetched batch is the next to be trained on; it counts as trained on then.

        It is not if the prefetcher took it before `load_from_checkpoint`.
        """
        # without the lock, which the prefetcher's thread holds while the language model runs
        if self._ahead and self._ahead[0] is batch:
            self._ahead.popleft()
            return True
        return False

    # ---- saving and loading

    @override
    def save_to_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Write the place in the data, the rows in the buffer and the random states into a folder."""
        with self._lock:
            buffer = self._buffer or self.get_data_loader()
            waiting = [*self._ahead, *([] if buffer.serving is None else [buffer.serving])]
            tensors, random_values = random_state()
            tensors |= self.state_dict()
            tensors["rest"] = buffer.position.rest
            if buffer.rows is not None:
                tensors["rows"] = buffer.rows
            if waiting:
                tensors["serving"] = torch.cat(waiting)
            state = {"position": buffer.position.as_json(), "random": random_values}
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME,
                metadata={_METADATA_KEY: json.dumps(state)},
            )

    @override
    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Go back to what `save_to_checkpoint` wrote; or about there, if SAELens's own store wrote it.

        Raises:
            ValueError: the dataset is another one.
        """
        path = Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME
        with safe_open(path, framework="pt", device="cpu") as file:
            saved = (file.metadata() or {}).get(_METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if saved is None:
            warnings.warn(
                f"{path} was written by SAELens's own store: training goes on at about the same place in the "
                "data, with other batches.",
                stacklevel=2,
            )
            super().load_from_checkpoint(checkpoint_path)
            return
        state = json.loads(saved)
        with self._lock:
            self._ahead.clear()
            position = Position(rest=tensors["rest"].to(self.device), **state["position"])
            self.n_dataset_processed = position.n_dataset_processed
            if self.cached_activation_dataset is not None:
                self.current_row_idx = position.cached_row
            else:
                self.iterable_sequences = TokenStream(self, position)
            self._buffer = self.get_data_loader()
            for name in ("rows", "serving"):
                if name in tensors:
                    setattr(self._buffer, name, tensors[name].to(self.device))
            set_random_state(tensors, state["random"])


class PrefetchedBatches(Iterator[torch.Tensor]):
    """What a trainer takes from a prefetcher, so that the store knows what still waits in its queue."""

    def __init__(self, prefetcher: PrefetchingIterator[torch.Tensor], store: ResumableStore) -> None:
        self._prefetcher, self._store = prefetcher, store

    def __next__(self) -> torch.Tensor:
        while True:
            batch = next(self._prefetcher)
            if self._store.is_next(batch):
                return batch

    def paused(self) -> AbstractContextManager[None]:
        """Keep the prefetcher's thread from running the language model meanwhile."""
        return self._prefetcher.paused()
