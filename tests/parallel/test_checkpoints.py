"""A checkpoint of some processes is continued by others, as if it had always been them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAETrainer, TrainingSAE
from safetensors.torch import load_file

from saelens_matryoshka.adam import fuse_adam
from saelens_matryoshka.parallel import Job
from saelens_matryoshka.parallel.dictionary import load_trainer_state, whole
from saelens_matryoshka.parallel.trainer import parallelize, writing
from saelens_matryoshka.upkeep.checkpoints import Checkpoints
from tests.helpers import runner_config, sparse_batches, trainer_for
from tests.parallel.processes import group_of, run_in_processes
from tests.parallel.test_training import BATCH, D_SAE, N_STEPS, D, sae_of

CASE = {"kind": "skip", "threshold_calibration": "l0", "aux_k": 2}
HALF = N_STEPS // 2
Mesh = tuple[int, int]


def train_half(mesh: Mesh, folder: Path, resumed: Path | None) -> dict[str, Any]:
    """The first half, or the second from a checkpoint, which is written at the end of the first."""
    sae = sae_of(CASE)
    group = group_of(*mesh, D_SAE)
    if group.shards > 1:
        cfg = runner_config(sae.cfg, resume_from_checkpoint=None if resumed is None else str(resumed))
        torch.manual_seed(0)
        sae = Job(group).overrides(cfg)["override_sae"]
    elif resumed is not None:
        sae.load_weights_from_checkpoint(resumed)
    own = BATCH // group.size
    batches = [
        batch[group.rank * own : (group.rank + 1) * own] for batch in sparse_batches(N_STEPS, BATCH, 2 * D)
    ]
    batches = batches[:HALF] if resumed is None else batches[HALF:]
    trainer = trainer_for(
        sae,
        batches,
        train_batch_size_samples=BATCH,
        total_training_samples=N_STEPS * BATCH,
        dead_feature_window=3,
        lr=3e-3,
        lr_decay_steps=20,
        lr_end=0.0,
    )
    if resumed is not None:
        load = SAETrainer.load_trainer_state
        if group.shards > 1:
            load_trainer_state(load, trainer, resumed, group=group)
        else:
            load(trainer, resumed)
    fuse_adam(trainer.optimizer)
    parallelize(trainer, group)
    for _ in batches:
        output = trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
    if resumed is None:
        writing(trainer, group, Checkpoints(folder).save)(trainer)
    sae.calibrate_threshold()
    result = {"loss": output.loss.detach(), "threshold": sae.topk_threshold.clone()}
    result["since_fired"] = trainer.n_forward_passes_since_fired
    result["samples"] = torch.tensor(trainer.n_training_samples)
    with whole(trainer, group):
        result |= {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    return result


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of one process, stopped and resumed."""
    folder = tmp_path_factory.mktemp("alone")
    run_in_processes(1, folder, train_half, (1, 1), folder, None)
    (checkpoint,) = [path for path in folder.iterdir() if path.is_dir()]
    return run_in_processes(1, folder, train_half, (1, 1), folder, checkpoint)[0]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 1), (1, 2)),
        ((1, 2), (1, 1)),
        ((1, 1), (2, 1)),
        ((1, 3), (1, 2)),
        *(
            pytest.param(*meshes, marks=pytest.mark.slow)
            for other in ((1, 1), (1, 4), (4, 1))
            for meshes in (((2, 2), other), (other, (2, 2)))
        ),
    ],
    ids=str,
)
def test_a_checkpoint_is_continued_by_other_processes(
    before: Mesh, after: Mesh, alone: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    run_in_processes(before[0] * before[1], tmp_path, train_half, before, folder, None)
    (checkpoint,) = folder.iterdir()
    assert load_file(checkpoint / "sae_weights.safetensors")["W_dec"].shape == (D_SAE, D)
    result = run_in_processes(after[0] * after[1], tmp_path, train_half, after, folder, checkpoint)[0]
    for name, value in alone.items():
        torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_shards_is_a_saelens_folder(tmp_path: Path) -> None:
    run_in_processes(2, tmp_path, train_half, (1, 2), tmp_path / "checkpoints", None)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    state = torch.load(checkpoint / "trainer_state.pt")
    assert {tuple(moments["exp_avg"].shape) for moments in state["optimizer"]["state"].values()} >= {
        (D, D_SAE),
        (D_SAE, D),
    }
    assert TrainingSAE.load_from_disk(checkpoint).W_dec.shape == (D_SAE, D)
