from __future__ import annotations

import copy
import io
import pickle
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import saelens_matryoshka as sm
from saelens_matryoshka.architectures.sparse_acts import SparseActs
from tests.helpers import run_steps, sparse_batches, trainer_for


@pytest.fixture
def dense() -> torch.Tensor:
    return torch.randn(6, 9).relu()


@pytest.fixture
def acts(dense: torch.Tensor) -> SparseActs:
    return SparseActs(dense.to_sparse_coo().coalesce())


@pytest.mark.parametrize("over_rows", [0, -2])
def test_sums_over_rows_are_dense(acts: SparseActs, dense: torch.Tensor, over_rows: int) -> None:
    fired = acts.bool().float()
    for sums, expected in [
        (acts.sum(over_rows), dense.sum(0)),
        (fired.sum(over_rows), (dense > 0).float().sum(0)),
    ]:
        assert type(sums) is torch.Tensor
        assert not sums.is_sparse
        torch.testing.assert_close(sums, expected)


def test_bfloat16_is_counted_without_rounding_on_the_way() -> None:
    many = SparseActs(torch.ones(1000, 1, dtype=torch.bfloat16).to_sparse_coo().coalesce())
    assert many.sum(0).dtype == torch.bfloat16
    assert many.sum(0).item() == 1000
    assert many.bool().float().sum(0).item() == 1000


def test_all_else_is_the_sparse_tensor(acts: SparseActs, dense: torch.Tensor) -> None:
    assert acts.is_sparse
    assert acts.layout == torch.sparse_coo
    assert acts.shape == dense.shape
    assert acts.is_coalesced()
    assert torch.equal(acts.to_dense(), dense)
    assert torch.equal(acts.values(), dense[dense > 0])
    assert torch.equal(acts.indices(), dense.nonzero().T)
    torch.testing.assert_close(acts.sum(), dense.sum())
    torch.testing.assert_close(acts.sum(-1).to_dense(), dense.sum(-1))
    torch.testing.assert_close(acts.sum(0, keepdim=True).to_dense(), dense.sum(0, keepdim=True))
    torch.testing.assert_close(acts.sum(dim=0).to_dense(), dense.sum(0))
    W_dec = torch.randn(9, 4)
    torch.testing.assert_close(acts @ W_dec, dense @ W_dec)
    torch.testing.assert_close(torch.sparse.mm(acts, W_dec), dense @ W_dec)
    assert "nnz" in repr(acts)


def test_copies_and_files_are_plain_sparse_tensors(acts: SparseActs, dense: torch.Tensor) -> None:
    file = io.BytesIO()
    torch.save(acts, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(acts),
        pickle.loads(pickle.dumps(acts)),
        torch.load(file),
        acts.detach(),
        acts.cpu(),
    ):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied.to_dense(), dense)


def test_statistics_of_saelens_trainer_sort_nothing_and_are_those_of_dense_activations() -> None:
    """If it fails, the trainer asks for something else, and a step costs more than it should."""
    calls: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    batches = sparse_batches(4, 64, 16)
    config = sm.MatryoshkaTrainingSAEConfig(d_in=16, d_sae=64, k=4, matryoshka_widths=[16, 64])
    torch.manual_seed(0)
    trainer = trainer_for(sm.MatryoshkaTrainingSAE(config), batches)
    with Count():
        outputs = run_steps(trainer, batches)
    assert calls["mm"]
    assert not calls["_coalesce"]
    acts = torch.stack([output.feature_acts.to_dense() for output in outputs])
    assert torch.equal(trainer.act_freq_scores, (acts > 0).sum(dim=(0, 1)).float())
    ago = torch.stack([(batch > 0).any(dim=0) for batch in acts.flip(0)]).int().argmax(dim=0)
    fired = (acts > 0).any(dim=1).any(dim=0)
    assert torch.equal(trainer.n_forward_passes_since_fired[fired], ago[fired].float())
