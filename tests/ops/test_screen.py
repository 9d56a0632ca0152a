"""The screen dismisses nothing that exceeds its bound, and what passes has the value it always has."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from saelens_matryoshka.ops import NestedObjective, NestedWeights, SparseStep, screen
from saelens_matryoshka.ops.encoder import Encoder
from saelens_matryoshka.ops.reference import selection_mask
from saelens_matryoshka.ops.screen import Screen
from saelens_matryoshka.ops.selection import select_batch


def _no_scratch(*_: object) -> None:
    return None


class Batch(NamedTuple):
    """Activations and weights, and how far from the ordinary they are."""

    n_rows: int
    d_in: int
    d_sae: int
    scale: float
    offset: float
    outlier: float
    seed: int

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.n_rows, self.d_in, generator=generator)
        x[:, 0] *= self.outlier
        x = (x + self.offset * torch.randn(self.d_in, generator=generator)) * self.scale
        W_enc = torch.randn(self.d_sae, self.d_in, generator=generator).T
        b_enc = torch.randn(self.d_sae, generator=generator) * self.scale
        return x, W_enc, b_enc


ordinary = Batch(40, 64, 300, 1.0, 0.0, 1.0, 0)
batches = st.builds(
    Batch,
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 60),
    st.sampled_from([1e-30, 1e-18, 1e-3, 1.0, 1e3, 1e15]),
    st.sampled_from([0.0, 1.0, 1e3]),
    st.sampled_from([1.0, 1e4]),
    st.integers(0, 1 << 16),
)


@pytest.fixture
def never_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_MAX_SHARE", 2)


@given(batches, st.floats(0, 1), st.integers(1, 50))
@example(ordinary._replace(n_rows=2, d_in=2, d_sae=1, scale=1e15, outlier=1e4), 0.0, 1)
def test_nothing_that_exceeds_a_bound_is_dismissed(batch: Batch, quantile: float, block_rows: int) -> None:
    x, W_enc, b_enc = batch.tensors()
    exact = x.double() @ W_enc.double() + b_enc.double()
    # each latent's bound is one of its own pre-activations, or just below it, where a wrong margin shows
    place = min(int(quantile * len(x)), len(x) - 1)
    bounds = (exact.sort(dim=0).values[place].clamp(min=0) * (1 - 1e-6)).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "_MAX_SHARE", 2)
        found = Screen(x, W_enc, b_enc, _no_scratch).entries_above(bounds, block_rows)
    if found is None:  # whose norms float32 cannot hold
        assert x.double().norm(dim=1).max() > 2**62
        return
    index, raised = found
    assert raised == 1
    assert (index.diff() > 0).all()
    passed = torch.zeros(exact.numel(), dtype=torch.bool)
    passed[index] = True
    computed = (x @ W_enc + b_enc).flatten()
    assert passed[(exact > bounds).flatten()].all()
    assert passed[computed > bounds.repeat(len(x))].all()


# 1, when rounded to bfloat16: no number is rounded by more
_ROUNDED_DOWN = 1 + 2**-8 - 2**-20


@pytest.mark.parametrize(
    ("of_x", "of_W_enc"), [(_ROUNDED_DOWN, 1.0), (1.0, _ROUNDED_DOWN), (_ROUNDED_DOWN,) * 2]
)
@pytest.mark.usefixtures("never_give_up")
def test_nothing_is_dismissed_where_all_rounding_errors_add_up(of_x: float, of_W_enc: float) -> None:
    # of so many the products are far enough from what is rounded to the same
    d = 136
    x, W_enc = torch.full((2, d), of_x), torch.full((5, d), of_W_enc).T
    x[1] *= -1  # so that the mean is 0
    bounds = torch.full((5,), d * of_x * of_W_enc * (1 - 1e-5))
    found = Screen(x, W_enc, torch.zeros(5), _no_scratch).entries_above(bounds, 2)
    assert found is not None
    assert found[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("gives_up", [False, True])
def test_nothing_is_dismissed_where_the_order_of_a_sum_decides(
    gives_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large numbers, all the same in bfloat16, the second half takes away what the first has added."""
    monkeypatch.setattr(screen, "_MAX_SHARE", 0 if gives_up else 2)
    x, W_enc = ((torch.randn(n, 400) * 1e4).bfloat16().float() for n in (50, 400))
    x, W_enc = (
        torch.cat([torch.cat([x, x], dim=1), -torch.cat([x, x], dim=1)]),
        torch.cat([W_enc, -W_enc], dim=1).T,
    )
    encoder = Encoder(x, W_enc, torch.zeros(400), None, _no_scratch, screened=True)
    computed = encoder._computed(torch.arange(100 * 400))
    assert (computed != (x @ W_enc).flatten()).float().mean() > 0.5, "the order decides"
    bound = computed.topk(10_000).values[-1]
    index, pre, _ = encoder.entries_above(bound, None)
    assert torch.equal(pre, computed[index])
    assert torch.isin((computed > bound).nonzero().squeeze(1), index).all()


@pytest.mark.parametrize("batch", [ordinary, ordinary._replace(offset=100.0)])
@pytest.mark.usefixtures("never_give_up")
def test_most_of_what_does_not_is(batch: Batch) -> None:
    """Also where the mean of the activations is large, as a language model's is, and the bias learned so."""
    x, W_enc, b_enc = batch.tensors()
    b_enc -= x.mean(dim=0) @ W_enc
    hidden_pre = x @ W_enc + b_enc
    bounds = hidden_pre.sort(dim=0, descending=True).values[1].clamp(min=0.1)
    found = Screen(x, W_enc, b_enc, _no_scratch).entries_above(bounds, len(x))
    assert found is not None
    assert len(found[0]) < 1.5 * (hidden_pre >= bounds).sum()


@pytest.mark.parametrize("what", ["many", "1e20", "inf", "nan"])
def test_a_screen_that_is_of_no_use_gives_up(what: str) -> None:
    x, W_enc, b_enc = ordinary.tensors()
    if what != "many":
        x[7, 3] = float(what)
    bounds = torch.full((300,), 0.1 if what == "many" else 1e9)
    assert Screen(x, W_enc, b_enc, _no_scratch).entries_above(bounds, 16) is None


@pytest.mark.parametrize("last", [1e-3, 0.2, 1.0, 1e6, None])
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("gives_up", [False, True])
def test_selection_is_the_top_k_wherever_the_candidates_begin(
    last: float | None, with_norms: bool, gives_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the values that are computed for the entries, to the bit, whether the screen is of use or not."""
    monkeypatch.setattr(screen, "_MAX_SHARE", 0 if gives_up else 2)
    x, W_enc, b_enc = ordinary.tensors()
    norms = torch.rand(300) + 0.5 if with_norms else None
    everything = Encoder(x, W_enc, b_enc, None, _no_scratch, screened=True)._computed(torch.arange(40 * 300))
    scores = everything.view(40, 300) if norms is None else everything.view(40, 300) * norms
    encoder = Encoder(x, W_enc, b_enc, None, _no_scratch, screened=True)
    threshold = None if last is None else last * scores.flatten().topk(120).values[-1]
    selection = select_batch(encoder, norms, 3, last_threshold=threshold)
    expected = selection_mask(scores, 3, "batch")
    assert torch.equal(torch.stack([selection.rows, selection.columns]), expected.nonzero().T)
    assert torch.equal(selection.scores, scores[expected])


@pytest.mark.usefixtures("never_give_up")
def test_a_cutoff_far_too_low_is_raised_to_what_a_sample_needs() -> None:
    x, W_enc, b_enc = ordinary._replace(n_rows=2048).tensors()
    encoder = Encoder(x, W_enc, b_enc, None, _no_scratch, screened=True)
    threshold = (x @ W_enc + b_enc).flatten().topk(8192).values[-1]
    low = encoder.entries_above(threshold / 4, None)
    index, _, cutoff = encoder.entries_above(threshold / 4, None, enough=8192)
    assert len(low[0]) > 10 * 8192
    assert 8192 < len(index) < 2 * 8192
    assert threshold / 4 < cutoff < threshold


@pytest.mark.usefixtures("never_give_up")
def test_a_sample_that_misleads_costs_a_second_search_and_nothing_else() -> None:
    """Every row of the sample scores high, and no other."""
    x, W_enc, b_enc = ordinary._replace(n_rows=320).tensors()
    x[:: screen._SAMPLED] *= 100
    encoder = Encoder(x, W_enc, b_enc, None, _no_scratch, screened=True)
    hidden_pre = x @ W_enc + b_enc
    last = hidden_pre.flatten().topk(320 * 40).values[-1]
    assert encoder.entries_above(0.9 * last, None, enough=320 * 40)[2] > last
    selection = select_batch(encoder, None, 40, last_threshold=last)
    kept = torch.zeros_like(hidden_pre, dtype=torch.bool)
    kept[selection.rows, selection.columns] = True
    assert torch.equal(kept, selection_mask(hidden_pre, 40, "batch"))


def test_a_step_screens_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(Screen):
        def __init__(self, encoder_in, *args) -> None:
            made.append(len(encoder_in))
            super().__init__(encoder_in, *args)

    monkeypatch.setattr("saelens_matryoshka.ops.encoder.Screen", Counted)
    monkeypatch.setattr(screen, "has_bfloat16_matrices", lambda _: True)

    def run(
        n_rows: int = 512,
        d: int = 256,
        d_sae: int = 2048,
        dtype: torch.dtype = torch.float32,
        by_latent: bool = True,
        autocast: bool = False,
        **settings,
    ) -> int:
        W_enc = torch.randn(d_sae, d, dtype=dtype).T
        weights = NestedWeights(
            W_enc if by_latent else W_enc.contiguous(),
            *(torch.randn(s, dtype=dtype) for s in (d_sae, (d_sae, d), d)),
        )
        objective = NestedObjective((d_sae // 2, d_sae), (1.0, 1.0), **{"k": 16, **settings})
        x = torch.randn(n_rows, d, dtype=dtype)
        made.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            SparseStep()(weights, x, x, objective, dead=None)
        return len(made)

    assert run() == 1
    assert run(n_rows=511) == run(d=255) == run(k=22) == run(d_sae=1534) == 0
    assert (
        run(dtype=torch.float64)
        == run(dtype=torch.bfloat16)
        == run(by_latent=False)
        == run(autocast=True)
        == 0
    )
    assert run(selection="token") == 0
    monkeypatch.setattr(screen, "has_bfloat16_matrices", lambda _: False)
    assert run() == 0


def test_units_for_matrices_that_torch_does_not_use_are_none() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        assert not screen.has_bfloat16_matrices("cpu")


def test_a_gpu_has_none_until_somebody_has_measured_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not screen.has_bfloat16_matrices("cuda")
    monkeypatch.setattr(screen, "ON_GPU", True)
    assert screen.has_bfloat16_matrices("cuda")
    assert not screen.has_bfloat16_matrices("mps")
