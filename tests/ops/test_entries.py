from __future__ import annotations

from typing import Any

import pytest
import torch

from saelens_matryoshka.ops import NestedObjective
from saelens_matryoshka.ops import entries as entries_module
from saelens_matryoshka.ops.entries import DenseEntries, GatheredEntries, kept_entries, sum_by_latent
from saelens_matryoshka.ops.levels import Levels
from saelens_matryoshka.ops.selection import Selection

N_ROWS, WIDTHS, D = 6, (2, 5, 9), 4
LEVELS = Levels.of(NestedObjective(WIDTHS, (1.0, 1.0, 1.0), k=3), torch.zeros(WIDTHS[-1], D))


def _selection(share: float = 0.4) -> tuple[Selection, torch.Tensor]:
    """A selection, and the same as a matrix; a row and a latent have no entry."""
    values = torch.rand(N_ROWS, WIDTHS[-1], dtype=torch.double) + 0.1
    kept = torch.rand(N_ROWS, WIDTHS[-1]) < share
    kept[2], kept[:, 3] = False, False
    rows, columns = kept.nonzero(as_tuple=True)
    found = values[rows, columns]
    return Selection(rows, columns, found, found, torch.zeros(())), values * kept


def _take(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return like.new_full(shape, torch.nan)


@pytest.mark.parametrize("form", [GatheredEntries, DenseEntries])
def test_products_are_those_of_the_matrix(form: Any) -> None:
    selection, matrix = _selection()
    decoder, source = torch.randn(WIDTHS[-1], D).double(), torch.randn(N_ROWS, 3).double()
    grads = torch.randn(N_ROWS, len(WIDTHS), D).double()
    level = LEVELS.of_latent
    entries = form(selection, LEVELS, N_ROWS, torch.double)

    by_level = torch.stack([(matrix * (level == i)) @ decoder for i in range(3)], dim=1)
    torch.testing.assert_close(entries.decode(selection.pre, decoder, 0, N_ROWS), by_level)
    in_two = [entries.decode(selection.pre, decoder, a, b) for a, b in ((0, 4), (4, N_ROWS))]
    torch.testing.assert_close(torch.cat(in_two), by_level)

    # each entry meets the gradient of its latent's level
    acts, own = entries.order(selection.pre), grads[:, level]
    expected = torch.einsum("bmd,md->bm", own, decoder)[selection.rows, selection.columns]
    act_grads = entries.act_grads(grads, decoder)
    torch.testing.assert_close(act_grads, entries.order(expected))
    torch.testing.assert_close(
        entries.decoder_grad(acts, grads, _take), torch.einsum("bm,bmd->md", matrix, own)
    )
    torch.testing.assert_close(entries.encoder_grad(acts, source, _take), matrix.T @ source)
    torch.testing.assert_close(entries.columns, entries.order(selection.columns))
    torch.testing.assert_close(sum_by_latent(entries.columns, acts, WIDTHS[-1]), matrix.sum(dim=0))


@pytest.mark.parametrize("form", [GatheredEntries, DenseEntries])
def test_without_entries_all_is_zero(form: Any) -> None:
    selection, _ = _selection(share=0.0)
    entries, grads = (
        form(selection, LEVELS, N_ROWS, torch.double),
        torch.randn(N_ROWS, len(WIDTHS), D).double(),
    )
    assert not entries.decode(selection.pre, torch.randn(WIDTHS[-1], D).double(), 0, N_ROWS).any()
    assert not entries.decoder_grad(selection.pre, grads, _take).any()


def test_a_cpu_gathers_whatever_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries_module, "gathered_dtype", lambda _: torch.bfloat16)
    selection, _ = _selection()
    assert isinstance(kept_entries(selection, LEVELS, N_ROWS, torch.zeros(WIDTHS[-1], D)), GatheredEntries)


@pytest.mark.parametrize(
    ("advantage", "dtype", "form"),
    [
        (256, torch.bfloat16, DenseEntries),
        (256, torch.float32, GatheredEntries),
        (1, torch.bfloat16, GatheredEntries),
    ],
)
def test_a_gpu_multiplies_densely_in_bfloat16_if_entries_are_not_rare(
    advantage: int, dtype: torch.dtype, form: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGpu:
        device = torch.device("cuda")

        def __len__(self) -> int:
            return WIDTHS[-1]

    monkeypatch.setattr(entries_module, "gathered_dtype", lambda _: dtype)
    monkeypatch.setattr(entries_module, "TENSOR_CORE_ADVANTAGE", advantage)
    selection, _ = _selection()
    weights: Any = OnGpu()
    assert isinstance(kept_entries(selection, LEVELS, N_ROWS, weights), form)


def test_levels_know_the_level_of_a_latent() -> None:
    assert LEVELS.of_latent.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert LEVELS.bounds.tolist() == [0, 2, 5, 9]
