from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from sae_lens.training.prefetch import PrefetchingIterator

import saelens_matryoshka as sm
from saelens_matryoshka.sites import Site
from saelens_matryoshka.store.pairs import PairedActivationsStore, paired_store, probe_hooks
from tests.fake_model import N_VOCAB, FakeModel
from tests.helpers import runner_config


def _dataset() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, N_VOCAB, (200, 16), generator=generator)
    tokens[:, 0] = 0
    return datasets.Dataset.from_dict({"input_ids": tokens.tolist()})


def _store(model: FakeModel, site: Site | None = None, **overrides: Any) -> PairedActivationsStore:
    sae = sm.MatryoshkaTrainingTranscoderConfig(
        d_in=2, d_out=1, d_sae=8, k=1, matryoshka_widths=[8], hook_name_out="hook_target"
    )
    cfg = runner_config(
        sae,
        **{"hook_name": "hook_source", "context_size": 16, "train_batch_size_tokens": 32} | overrides,
    )
    return paired_store(model, cfg, site or Site("hook_source"), _dataset())


def _assert_aligned(batch: torch.Tensor) -> None:
    token, position, target = batch.unbind(dim=-1)
    torch.testing.assert_close(target, token * 10_000 + position, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("overrides", "positions", "excluded"),
    [
        ({}, range(16), []),
        ({"activations_mixing_fraction": 0.0}, range(16), []),
        ({"activations_mixing_fraction": 0.9}, range(16), []),
        ({"seqpos_slice": (3, -2)}, range(3, 14), []),
        ({"seqpos_slice": (1, None, 3)}, range(1, 16, 3), []),
        ({"exclude_special_tokens": True}, range(16), [0, 1]),
        ({"exclude_special_tokens": [0, 7, 8]}, range(16), [0, 7, 8]),
        ({"exclude_special_tokens": True, "seqpos_slice": (0, 5)}, range(5), [0, 1]),
    ],
    ids=str,
)
@pytest.mark.parametrize("prefetch", [False, True])
def test_source_and_target_stay_together(
    overrides: dict[str, Any], positions: range, excluded: list[int], prefetch: bool
) -> None:
    store = _store(FakeModel(), **overrides)
    batches = PrefetchingIterator(iter(store), prefetch=2) if prefetch else iter(store)
    seen: list[torch.Tensor] = []
    for _ in range(30):
        batch = next(batches)
        assert batch.shape == (32, 3)
        _assert_aligned(batch)
        seen.append(batch)
    if isinstance(batches, PrefetchingIterator):
        batches.close()
    rows = torch.cat(seen)
    assert set(rows[:, 1].int().tolist()) <= set(positions)
    assert not torch.isin(rows[:, 0].int(), torch.tensor(excluded or [-1])).any()


def test_rows_are_shuffled() -> None:
    batch = next(iter(_store(FakeModel())))
    assert (batch[1:, 1] - batch[:-1, 1] != 1).any()


def test_a_pair_costs_one_forward_pass() -> None:
    model = FakeModel()
    store = _store(model)
    store.get_activations(store.get_batch_tokens())
    assert model.n_forward_passes == 1


def test_source_is_multiplied_by_the_gain() -> None:
    gain, offset = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.5])
    plain, gained = _store(FakeModel()), _store(FakeModel(), Site("hook_source", gain, offset))
    tokens = plain.get_batch_tokens()
    one, other = plain.get_activations(tokens), gained.get_activations(tokens)
    torch.testing.assert_close(other[..., :2], one[..., :2] * gain + offset)
    assert torch.equal(other[..., 2:], one[..., 2:])


def test_cached_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="use_cached_activations"):
        _store(FakeModel(), use_cached_activations=True)


def test_probe_finds_widths_and_order() -> None:
    probe = probe_hooks(FakeModel(), "hook_source", "hook_target")
    assert probe == (2, 1, False, False)
    assert probe_hooks(FakeModel(), "hook_target", "hook_source").target_is_first
    assert probe_hooks(FakeModel(), "hook_source", "hook_source").same_tensor
