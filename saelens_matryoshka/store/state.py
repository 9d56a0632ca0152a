"""What a checkpoint knows of the activation stores: one file for each process, and how others take it over.

A file has the rows that wait to be trained on, the tokens of documents begun that are not used yet, the place
in the dataset and the random states. The first process's is SAELens's own file. As many processes as have
written them go on to the last bit, each with its own. Any other number takes over what there is: the
waiting rows are dealt out, the rests of documents too, and what is left of the dataset (see
`saelens_matryoshka.store.shares`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from safetensors import safe_open
from safetensors.torch import save, save_file

from saelens_matryoshka.store.shares import Begun
from saelens_matryoshka.store.token_stream import Position

_METADATA_KEY = "saelens_matryoshka"


class StoreState(NamedTuple):
    """The state of one process's store."""

    position: Position
    rows: torch.Tensor | None
    """`[n, d]`, in the buffer to be mixed"""
    serving: torch.Tensor | None
    """`[n, d]`, shuffled, or taken ahead by a prefetcher: whole batches"""
    random: tuple[dict[str, torch.Tensor], dict[str, Any]]
    """as `saelens_matryoshka.random_state` gives it"""
    size: int = 1
    """how many processes there are"""

    def save(self, folder: Path) -> None:
        """Write it as the first process's."""
        tensors, metadata = self._as_saved()
        save_file(tensors, state_file(folder, 0), metadata)

    def to_bytes(self) -> bytes:
        """The content of its file."""
        return save(*self._as_saved())

    def _as_saved(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        rests, position = self.position.saved()
        tensors, random_values = self.random
        tensors = {
            **tensors,
            "n_dataset_processed": torch.tensor(self.position.n_dataset_processed),  # what SAELens saves
            "rest": rests,
            **({} if self.rows is None else {"rows": self.rows.contiguous()}),
            **({} if self.serving is None else {"serving": self.serving.contiguous()}),
        }
        values = {"position": position, "random": random_values, "size": self.size}
        return tensors, {_METADATA_KEY: json.dumps(values)}


def state_file(folder: Path, rank: int) -> Path:
    """Where the state of a process's store lies in a checkpoint."""
    name = Path(ACTIVATIONS_STORE_STATE_FILENAME)
    return folder / (name if rank == 0 else name.with_suffix(f".{rank}{name.suffix}"))


def n_states(folder: Path) -> int:
    """Of how many processes a checkpoint has the states; 0 if it only has SAELens's count of documents."""
    values = _values(state_file(folder, 0))
    return 0 if values is None else values.get("size", 1)


def load_state(folder: Path, rank: int) -> StoreState:
    """The state that a process has saved in a checkpoint."""
    path = state_file(folder, rank)
    values = _values(path)
    assert values is not None
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return StoreState(
        position=Position.of_saved(tensors["rest"], values["position"]),
        rows=tensors.get("rows"),
        serving=tensors.get("serving"),
        random=({name: tensors[name] for name in tensors if name.startswith("random.")}, values["random"]),
        size=values.get("size", 1),
    )


def take_over(states: Iterable[StoreState], rank: int, size: int) -> StoreState:
    """A process's part of what other processes, in another number, have left.

    Together all parts have every row that waited, every rest of a document and every document of this epoch
    that was not begun. A process that had come to its next epoch begins that one again.

    Args:
        states: Of all of them in their order; one at a time is in memory.
        rank: Of the process that goes on.
        size: How many go on.
    """
    positions: list[Position] = []
    rows: list[torch.Tensor] = []
    randoms, n_waiting = [], 0
    for state in states:
        positions.append(state.position)
        randoms.append(state.random)
        for waiting in (state.serving, state.rows):
            if waiting is not None:
                rows.append(waiting[(rank - n_waiting) % size :: size].clone())
                n_waiting += len(waiting)
    n = len(positions)
    epoch = min(position.epoch for position in positions)
    division = tuple(
        Begun(position.n_documents, position.fingerprint) if position.epoch == epoch else None
        for position in positions
    )
    before = next(position.before for position in positions if position.epoch == epoch)
    rests = (
        rest for other, position in enumerate(positions) if other % size == rank for rest in position.rests
    )
    return StoreState(
        position=Position(
            rests=tuple(rest for rest in rests if len(rest)),
            epoch=epoch,
            before=(*before, division),
            n_dataset_processed=sum(position.n_dataset_processed for position in positions) // size,
            cached_row=sum(position.cached_row for position in positions) // size,
        ),
        rows=torch.cat(rows) if rows else None,
        serving=None,
        random=randoms[rank % n],
        size=size,
    )


def _values(path: Path) -> dict[str, Any] | None:
    with safe_open(path, framework="pt") as file:
        saved = (file.metadata() or {}).get(_METADATA_KEY)
    return None if saved is None else json.loads(saved)
