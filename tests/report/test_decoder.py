from __future__ import annotations

import torch
import torch.nn.functional as F

from saelens_matryoshka.report import decoder
from saelens_matryoshka.report.decoder import decoder_relations
from saelens_matryoshka.widths import latent_levels

WIDTHS = [5, 20, 64]


def test_they_are_those_of_the_whole_matrix_of_cosines(monkeypatch) -> None:
    monkeypatch.setattr(decoder, "_CHUNK_VALUES", 7 * WIDTHS[-1])
    W_dec = torch.randn(WIDTHS[-1], 12)
    found = decoder_relations(W_dec, WIDTHS, n=4)
    rows = F.normalize(W_dec, dim=-1)
    cosines = rows @ rows.T
    cosines.fill_diagonal_(-2)
    level = latent_levels(WIDTHS)
    torch.testing.assert_close(found.nearest_cosine, cosines.topk(4).values)
    assert torch.equal(found.nearest, cosines.topk(4).indices)
    for j in range(WIDTHS[-1]):
        coarser = level < level[j]
        if not coarser.any():
            assert found.parent[j] == -1
            continue
        expected = torch.where(coarser, cosines[j], -2).argmax()
        assert found.parent[j] == expected
        torch.testing.assert_close(found.parent_cosine[j], cosines[j, expected])
    for row in range(3):
        mine = level == row
        for column in range(row + 1):
            nearest = torch.where(level == column, cosines[mine], -2).amax(dim=1)
            torch.testing.assert_close(found.mean_cosine[row, column], nearest.double().mean())
            share = (level[found.parent[mine]] == column).double().mean() if row else torch.zeros(())
            torch.testing.assert_close(found.parents_in[row, column].double(), share.double())


def test_a_plain_dictionary_and_a_level_of_one_latent_have_relations_too() -> None:
    plain = decoder_relations(torch.randn(6, 4), [6])
    assert (plain.parent == -1).all()
    assert plain.nearest.shape == (6, 5)
    alone = decoder_relations(torch.randn(6, 4), [1, 6])
    assert (alone.parent[1:] == 0).all()
    assert alone.mean_cosine.isfinite().all()
    assert alone.mean_cosine[0, 0] == 0
