"""An activation store that can be continued: the batch after a restart is the one it would have been.

SAELens's store saves how many documents it has read. The next batch depends on more: on the rows in the
mixing buffer and those shuffled but not yet served, on the tokens of a document that are not used yet, on the
random state that will shuffle the next ones, and, with prefetching, on the batches that wait in the queue.
`ResumableStore` saves all of it, in SAELens's own file, so that SAELens's own `resume_from_checkpoint`
continues exactly as well. The price is the size of the buffer:
`n_batches_in_buffer × context_size × (d_in [+ d_out]) × bytes per value`.

Of many processes each has a store that reads its share of the documents, and a state of its own.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.training.prefetch import PrefetchingIterator
from safetensors.torch import load_file, save_file
from typing_extensions import override

from saelens_matryoshka.random_state import random_state, set_random_state
from saelens_matryoshka.seams import OpenStore, before_split_off, read_from
from saelens_matryoshka.store.mixing import MixingBuffer
from saelens_matryoshka.store.shares import Shares
from saelens_matryoshka.store.state import StoreState, load_state, n_states, take_over
from saelens_matryoshka.store.token_stream import Position, TokenStream

_COUNT = "n_dataset_processed"


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
        self.rank, self.size = 0, 1
        self._shares: Shares | None = None
        super().__init__(*args, **kwargs)

    # ---- sharing

    def read_share(self, rank: int, size: int) -> None:
        """Read one of `size` shares of the data. The store has not been read from."""
        self.rank, self.size = rank, size
        if self.cached_activation_dataset is not None:
            self.cached_activation_dataset = self.cached_activation_dataset.shard(
                size, rank, contiguous=False
            )
            return
        self._shares = self._whole()
        read_from(self, self._shares.share(rank, size))

    def _whole(self) -> Shares:
        return self._shares or Shares(self.dataset, self.tokens_column, *before_split_off(self))

    # ---- streaming

    @override
    def sequences(self) -> TokenStream:
        current: TokenStream | None = getattr(self, "iterable_sequences", None)
        return TokenStream(self, Position(epoch=0 if current is None else current.next_epoch))

    @override
    def get_data_loader(self) -> MixingBuffer[Position]:
        return MixingBuffer(
            ((rows, self._position()) for rows in self.filtered_activations()),
            buffer_size=self.n_batches_in_buffer * self.training_context_size,
            batch_size=self.train_batch_size_tokens,
            mix_fraction=self.activations_mixing_fraction,
            start=self._position(),
        )

    def require_buffer(self) -> None:
        """Refuse, before anything is read, a mixing buffer that could not serve this process a batch.

        Raises:
            ValueError: see `saelens_matryoshka.store.mixing.require_buffer`.
        """
        self.get_data_loader()

    @override
    def __next__(self) -> torch.Tensor:
        with self._lock:
            if self._buffer is None:
                self._buffer = self.get_data_loader()
            batch = next(self._buffer).to(self.device)  # what was saved waits in main memory
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

    def state(self) -> StoreState:
        """The place in the data, the rows that wait, and the random states."""
        with self._lock:
            buffer = self._buffer or self.get_data_loader()
            waiting = [*self._ahead, *([] if buffer.serving is None else [buffer.serving])]
            return StoreState(
                position=buffer.position,
                rows=buffer.rows,
                serving=torch.cat([rows.cpu() for rows in waiting]) if waiting else None,
                random=random_state(),
                size=self.size,
            )

    @override
    def save_to_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Write the state into a folder."""
        self.state().save(Path(checkpoint_path))

    @override
    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Go back to what `save_to_checkpoint` wrote; or about there, if SAELens's own store wrote it.

        If other processes have written it, in another number, take over a part of what they have left.

        Raises:
            ValueError: the dataset is another one.
        """
        folder = Path(checkpoint_path)
        n = n_states(folder)
        if n == 0:
            self._pass_over(folder)
        elif n == self.size:
            self._restore(load_state(folder, self.rank))
        else:
            self._take_over(take_over((load_state(folder, rank) for rank in range(n)), self.rank, self.size))

    def _restore(self, state: StoreState) -> None:
        with self._lock:
            buffer = self._go_to(state)
            buffer.rows = None if state.rows is None else state.rows.to(self.device)
            buffer.serving = state.serving

    def _take_over(self, state: StoreState) -> None:
        if self.cached_activation_dataset is not None:
            warnings.warn(
                "Another number of processes goes on with activations that SAELens has cached, at about the "
                "same place in them.",
                stacklevel=3,
            )
        with self._lock:
            buffer = self._go_to(state)
            if state.rows is not None:
                buffer.take_over(state.rows)
            if buffer.rows is not None:
                buffer.rows = buffer.rows.to(self.device)

    def _go_to(self, state: StoreState) -> MixingBuffer[Position]:
        self._ahead.clear()
        rests = tuple(rest.to(self.device) for rest in state.position.rests)
        position = dataclasses.replace(state.position, rests=rests)
        self.n_dataset_processed = position.n_dataset_processed
        if self.cached_activation_dataset is not None:
            self.current_row_idx = position.cached_row
        else:
            left = self._whole().share(self.rank, self.size, position.before) if position.before else None
            self.iterable_sequences = TokenStream(self, position, left)
        self._buffer = self.get_data_loader()
        set_random_state(*state.random)
        return self._buffer

    def _pass_over(self, folder: Path) -> None:
        """Go to about the place of a checkpoint that has no more than a count of documents.

        They are those of all processes together. SAELens counts a document when the next one is asked for:
        one more than it has counted has been begun.
        """
        path = folder / ACTIVATIONS_STORE_STATE_FILENAME
        warnings.warn(
            f"{path} was written by SAELens's own store, or by an older version in many processes: training "
            "goes on at about the same place in the data, with other batches.",
            stacklevel=3,
        )
        n_begun = int(load_file(path)[_COUNT]) + 1
        own = torch.tensor(max(len(range(self.rank, n_begun, self.size)) - 1, 0))
        with TemporaryDirectory() as temporary:
            own_path = Path(temporary) / ACTIVATIONS_STORE_STATE_FILENAME
            save_file({_COUNT: own}, own_path)
            self.load(str(own_path))


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
