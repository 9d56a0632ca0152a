from __future__ import annotations

import pytest
import torch

from saelens_matryoshka.report.accumulate import ExamplePool, Scales, order_within
from saelens_matryoshka.report.firings import Firings

D_SAE, SIZE, N_INTERVALS = 7, 3, 8


def _offer(pool: ExamplePool, groups: torch.Tensor, rank: torch.Tensor, ids: torch.Tensor) -> None:
    taken, at, slots = pool.offer(groups, rank)
    windows = ids[taken, None].float()
    pool.put(at, slots, rank=rank[taken], positions=ids[taken], values=rank[taken], windows=windows)


def test_a_pool_keeps_the_highest_of_all_batches() -> None:
    pool = ExamplePool(D_SAE, SIZE, 1, torch.device("cpu"))
    all_groups, all_ranks, n = [], [], 0
    for size in (1, 40, 0, 5, 300, 2):
        groups, rank = torch.randint(0, D_SAE - 1, (size,)), torch.rand(size)
        _offer(pool, groups, rank, torch.arange(n, n + size))
        all_groups.append(groups)
        all_ranks.append(rank)
        n += size
    groups, ranks = torch.cat(all_groups), torch.cat(all_ranks)
    for group in range(D_SAE):
        mine = (groups == group).nonzero().squeeze(1)
        best = mine[ranks[mine].argsort(descending=True)[:SIZE]]
        kept = pool.positions[group] >= 0
        assert sorted(pool.positions[group, kept].tolist()) == sorted(best.tolist())
        assert torch.equal(pool.values[group, kept], ranks[pool.positions[group, kept]])
        assert torch.equal(pool.windows[group, kept, 0], pool.positions[group, kept].float())
    assert (pool.positions[D_SAE - 1] == -1).all(), "nothing was offered to the last"


@pytest.mark.parametrize("growth", [1.0, 3.0, 100.0])
def test_intervals_hold_the_firings_with_the_highest_keys_however_the_scale_grew(growth: float) -> None:
    """So each is a uniform sample: as if the last scale had been known from the start."""
    pool = ExamplePool(D_SAE * N_INTERVALS, SIZE, 1, torch.device("cpu"))
    scales = Scales(D_SAE, 16, torch.device("cpu"))
    largest = torch.zeros(D_SAE)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    n = 0
    for batch in range(6):
        latents = torch.randint(0, D_SAE, (150,)).sort().values
        values = torch.rand(150) * growth ** (batch / 5) + 1e-3
        keys, ids = torch.rand(150), torch.arange(n, n + 150)
        n += 150
        largest.scatter_reduce_(0, latents, values, "amax")
        doublings = scales.grow(largest)
        for step in range(int(doublings.max())):
            pool.join_pairs((doublings > step).nonzero().squeeze(1), N_INTERVALS)
        bins = scales.add(Firings(latents, ids, values))
        taken, at, slots = pool.offer(bins // (16 // N_INTERVALS), keys)
        pool.put(
            at,
            slots,
            rank=keys[taken],
            positions=ids[taken],
            values=values[taken],
            windows=values[taken, None],
        )
        seen.append((latents, values, keys))
    latents, values, keys = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert (scales.scale > largest).all()
    assert (scales.scale <= 2 * largest).all()
    for latent in range(D_SAE):
        mine = latents == latent
        edges = torch.linspace(0, scales.scale[latent].item(), 17)
        assert torch.equal(scales.counts[latent], torch.histogram(values[mine], edges).hist.long())
        interval = (values / scales.scale[latent] * N_INTERVALS).long()
        for index in range(N_INTERVALS):
            inside = (mine & (interval == index)).nonzero().squeeze(1)
            expected = inside[keys[inside].argsort(descending=True)[:SIZE]]
            group = latent * N_INTERVALS + index
            kept = pool.positions[group] >= 0
            assert sorted(pool.positions[group, kept].tolist()) == sorted(expected.tolist())
            assert torch.equal(pool.windows[group, kept, 0], values[pool.positions[group, kept]])


def test_one_sort_orders_by_group_and_within_it_from_the_highest_rank() -> None:
    groups = torch.randint(0, 1 << 20, (500,)) // 3 * 5
    rank = torch.cat([torch.rand(240), 1e30 * torch.rand(240), torch.zeros(10), 1e-40 * torch.rand(10)])
    found = order_within(groups, rank)
    pairs = sorted(zip(groups.tolist(), (-rank).tolist(), strict=True))
    assert list(zip(groups[found].tolist(), (-rank[found]).tolist(), strict=True)) == pairs
