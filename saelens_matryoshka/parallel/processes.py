"""`Group` for many processes: plain collectives on a mesh of blocks of rows by blocks of latents.

Of a mesh `(R, L)`, the processes of a row of the mesh hold the same rows (tokens) and other latents, those of
a column other rows and the same latents. `(N, 1)` is data parallel, `(1, N)` a dictionary in N shards, and
between them are R copies of a dictionary in L shards. A row of the mesh is L consecutive ranks: the shards of
a copy, which talk throughout the step, are neighbours.

Latents are dealt out like cards: shard r has r, r + L, r + 2L, ... So every shard is a nested dictionary of
its own, with its share of every level, whatever the widths; and the first latents, which are active more
often than the others, are not all on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from saelens_matryoshka.ops.group import Group, Over

_DIGIT_BITS = 11
_SIGN_64 = -(1 << 63)
# Bytes that are sent at a time.
_PIECE = 64 << 20
_NOBODY = -1


class Processes(Group):
    """This process's block, and the others.

    Args:
        mesh: With dimensions "rows" and "latents", over all processes.
        d_sae: Latents of the whole dictionary.
    """

    def __init__(self, mesh: DeviceMesh, d_sae: int) -> None:
        self.row_blocks, self.shards = mesh["rows"].size(), mesh["latents"].size()
        self.row_block, self.shard = mesh["rows"].get_local_rank(), mesh["latents"].get_local_rank()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.d_sae = d_sae
        self.is_writing = False
        """this process is doing something for all, which the others do not take part in"""
        self.give: Callable[[], bytes] = bytes
        """what this process answers when the first one asks"""
        self.device = torch.device(mesh.device_type)
        self._groups: dict[Over, dist.ProcessGroup | None] = {
            "rows": mesh["rows"].get_group() if self.row_blocks > 1 else None,
            "latents": mesh["latents"].get_group() if self.shards > 1 else None,
            "all": dist.group.WORLD if self.size > 1 else None,
        }

    # ---- latents

    def process_group(self, over: Over) -> dist.ProcessGroup | None:
        """torch's group of these processes; None if this one is alone in it."""
        return self._groups[over]

    def latents(self, shard: int | None = None) -> slice:
        """The latents of a shard, this process's by default, among those of the whole dictionary."""
        return slice(self.shard if shard is None else shard, self.d_sae, self.shards)

    @override
    def widths(self, widths: Sequence[int]) -> tuple[int, ...]:
        return tuple(len(range(*self.latents().indices(width))) for width in widths)

    # ---- collectives

    @override
    def sum(self, tensor: torch.Tensor, over: Over) -> torch.Tensor:
        return self._reduce(tensor, over, dist.ReduceOp.SUM)

    @override
    def min(self, tensor: torch.Tensor, over: Over) -> torch.Tensor:
        return self._reduce(tensor, over, dist.ReduceOp.MIN)

    @override
    def count(self, n: int, over: Over) -> int:
        if self._groups[over] is None:
            return n
        return int(self.sum(torch.tensor(n, device=self.device), over))

    @override
    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.tensor_split(self.size)[self.rank]

    @override
    def in_turn(self, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, bool]]:
        group = self._groups["latents"]
        lengths = self.gather(torch.tensor([len(rows)], device=self.device), "latents")
        for shard, length in enumerate(map(int, lengths)):
            is_own = shard == self.shard
            found = rows.contiguous() if is_own else rows.new_empty(length, *rows.shape[1:])
            if group is not None:
                dist.broadcast(found, self.row_block * self.shards + shard, group=group)
            yield found, is_own

    @override
    def gather_latents(self, values: torch.Tensor) -> torch.Tensor:
        if self.shards == 1:
            return values
        whole = values.new_zeros(self.d_sae)
        whole[self.latents()] = values
        return self.sum(whole, "latents")

    def gather(self, tensor: torch.Tensor, over: Over) -> list[torch.Tensor]:
        """The tensors of all blocks, which have one shape, in the order of the blocks."""
        group = self._groups[over]
        if group is None:
            return [tensor]
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return parts

    def _reduce(self, tensor: torch.Tensor, over: Over, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        group = self._groups[over]
        if group is None:
            return tensor
        tensor = tensor.to(self.device).contiguous()
        dist.all_reduce(tensor, op, group=group)
        return tensor

    # ---- what the first process asks the others for, while it does something for all

    def ask(self, rank: int, take: Callable[[memoryview], Any]) -> None:
        """In the first process: `take` what another one gives, piece by piece. The others are in `answer`."""
        self._next_to_give(rank)
        length = torch.zeros((), dtype=torch.int64, device=self.device)
        dist.recv(length, rank)
        pieces = iter([min(_PIECE, int(length) - start) for start in range(0, int(length), _PIECE)])
        buffer = torch.empty(min(_PIECE, int(length)), dtype=torch.uint8, device=self.device)
        try:
            for n_bytes in pieces:
                dist.recv(buffer[:n_bytes], rank)
                take(buffer[:n_bytes].cpu().numpy().data)
        finally:
            for n_bytes in pieces:  # of what could not be taken, for the other one to go on
                dist.recv(buffer[:n_bytes], rank)

    def ask_no_more(self) -> None:
        """In the first process: let the others go on."""
        self._next_to_give(_NOBODY)

    def answer(self) -> None:
        """In the others: give what the first one asks for, until it asks no more."""
        given: bytes | None = None
        while (rank := self._next_to_give()) != _NOBODY:
            if given is None:  # all make it ready while one after the other sends
                given = self.give()
            if rank == self.rank:
                dist.send(torch.tensor(len(given), device=self.device), 0)
                for start in range(0, len(given), _PIECE):
                    piece = bytearray(given[start : start + _PIECE])
                    dist.send(torch.frombuffer(piece, dtype=torch.uint8).to(self.device), 0)

    def _next_to_give(self, rank: int = _NOBODY) -> int:
        """The rank that the first process says, in all."""
        said = torch.tensor(rank, device=self.device)
        dist.broadcast(said, 0)
        return int(said)

    # ---- the largest

    @override
    def kth_largest(self, values: torch.Tensor, n: int) -> torch.Tensor:
        return _kth_largest(values, n, self)

    @override
    def largest(
        self, values: torch.Tensor, n: int, index: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        if n == 0:
            return torch.zeros_like(values, dtype=torch.bool)
        smallest_kept = self.kth_largest(values, n)
        above, tied = values > smallest_kept, values == smallest_kept
        n_above, n_tied = self.sum(torch.stack([above.sum(), tied.sum()]), "all").tolist()
        if n_above + n_tied > n:
            place = self._index_in_whole(index[tied], shape)
            last = -_kth_largest(-place, n - n_above, self)
            tied[tied.clone()] = place <= last
        return above | tied

    def _index_in_whole(self, index: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Flat, row-major index in the whole batch and dictionary, from that in this block."""
        rows, columns = index // shape[1] + self.row_block * shape[0], index % shape[1]
        return rows * self.d_sae + self.shard + columns * self.shards

    @override
    def row_thresholds(self, values: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.shards == 1:
            return super().row_thresholds(values, n)
        own = values.topk(min(n, values.shape[1]), dim=-1).values
        own = torch.nn.functional.pad(own, (0, n - own.shape[1]), value=-torch.inf)
        largest = torch.stack(self.gather(own, "latents"))  # [shards, rows, n]
        thresholds = largest.permute(1, 0, 2).flatten(1).topk(n, dim=-1).values[:, -1:]
        above = (largest > thresholds).sum(dim=-1)
        tied = (largest == thresholds).sum(dim=-1)
        room = n - above.sum(dim=0)
        places = (above + tied)[self.shard]
        crowded = (tied.sum(dim=0) > room).nonzero().squeeze(1)
        if len(crowded):
            kept = self._first_tied(values[crowded] == thresholds[crowded], room[crowded])
            places[crowded] = above[self.shard, crowded] + kept
        return thresholds, places

    def _first_tied(self, tied: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """How many of this shard's ties `[rows, m]` are among the first `room` of the whole dictionary's."""
        width = len(range(*self.latents(0).indices(self.d_sae)))  # of the widest shard
        padded = torch.nn.functional.pad(tied.to(torch.uint8), (0, width - tied.shape[1]))
        # [rows, m, shards]: in the order of latents
        whole = torch.stack(self.gather(padded, "latents"), dim=-1)
        first = whole.flatten(1).cumsum(dim=-1).view_as(whole) <= room[:, None, None]
        return (first & whole.bool())[..., self.shard].sum(dim=-1)


# ---- the n-th largest by radix: a few small sums, whatever the number of values


def _keys(values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Bit patterns that, read as unsigned numbers, are in the order of the values; and how many bits."""
    if not values.is_floating_point():
        return values ^ _SIGN_64, 64
    if values.dtype == torch.double:
        bits = values.view(torch.int64)
        return torch.where(bits < 0, ~bits, bits ^ _SIGN_64), 64
    bits = values.float().view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >= 1 << 31, bits ^ 0xFFFFFFFF, bits | 1 << 31), 32


def _value(key: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The value of a key."""
    if not dtype.is_floating_point:
        return key ^ _SIGN_64
    if dtype == torch.double:
        return torch.where(key < 0, key ^ _SIGN_64, ~key).view(torch.double)
    bits = torch.where(key >= 1 << 31, key ^ 1 << 31, key ^ 0xFFFFFFFF)
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32).to(dtype)


def _kth_largest(values: torch.Tensor, n: int, group: Group) -> torch.Tensor:
    """The n-th largest of the values of all processes, found digit by digit from the highest.

    Every digit costs a sum of 2^11 counts over all processes. Nothing is sorted, and no GPU waited for.
    """
    keys, stop = _keys(values)
    # of one entry each: to index with a scalar is to wait for it
    found, left = keys.new_zeros(1), keys.new_full((1,), n)
    agrees = torch.ones_like(keys, dtype=torch.bool)
    while stop > 0:
        start = max(0, stop - _DIGIT_BITS)
        n_digits = 1 << (stop - start)
        digits = (keys >> start) & (n_digits - 1)
        counts = keys.new_zeros(n_digits).scatter_add_(0, digits, agrees.long())
        counts = group.sum(counts, "all")
        at_least = counts.flip(0).cumsum(0).flip(0)  # how many have this digit or a larger one
        digit = (at_least >= left).sum(dim=0, keepdim=True) - 1
        left = left - at_least[digit] + counts[digit]
        found = found | (digit << start)
        agrees = agrees & (digits == digit)
        stop = start
    return _value(found, values.dtype).squeeze()
