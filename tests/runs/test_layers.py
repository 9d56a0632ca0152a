"""Runs in lockstep have a run folder each; the same call goes on, and leaves out what is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from safetensors.torch import load_file

from saelens_matryoshka.layers.lockstep import PartRunner
from saelens_matryoshka.runs import layers as layers_module
from saelens_matryoshka.runs.catalogue import find_runs
from saelens_matryoshka.runs.fields import Given
from saelens_matryoshka.runs.folder import RunFolder
from saelens_matryoshka.runs.layers import (
    each_of,
    label_of,
    parse_layers,
    resolve_many,
    resume_many,
    train_many,
)
from saelens_matryoshka.runs.recorded import read_lines
from saelens_matryoshka.runs.training import resume_run
from saelens_matryoshka.stopping import RunStopped
from saelens_matryoshka.upkeep.keeper import Keeper, Upkeep


def _layer(**values: Any) -> dict[str, Given]:
    return {name: Given(value, "flag") for name, value in values.items()}


_COMMON: dict[str, Any] = {
    "model_name": "tiny",
    "d_sae": 64,
    "k": 4,
    "training_tokens": 128 * 6,
    "train_batch_size_tokens": 128,
    "context_size": 32,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 8,
    "n_eval_batches": 1,
}


def _settings(layers: str = "0-1", **overrides: Any) -> Any:
    return resolve_many([_layer(**{**_COMMON, **overrides})], each_of(layers, "mlp"))


@pytest.mark.parametrize(
    ("text", "layers"),
    [("3", [3]), ("0-2", [0, 1, 2]), ("0,4,8", [0, 4, 8]), ("0-1, 5,7-8", [0, 1, 5, 7, 8])],
)
def test_layers_are_ranges_and_lists(text: str, layers: list[int]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "1,,2", "0-3,2"])
def test_what_is_no_list_of_layers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--layers"):
        parse_layers(text)


def test_mappings_are_combined_with_layers_and_those_that_name_theirs_are_not() -> None:
    found = each_of("0,2", "mlp,attention,cross-layer:0-3")
    values = [{name: given.value for name, given in one.items()} for one in found]
    assert values == [
        {"mapping": "mlp", "layer": 0},
        {"mapping": "mlp", "layer": 2},
        {"mapping": "attention", "layer": 0},
        {"mapping": "attention", "layer": 2},
        {"mapping": "cross-layer:0-3"},
    ]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["mlp-0", "mlp-1", "mlp-2"], "mlp-0-2"),
        (["mlp-0", "mlp-4"], "mlp-0,4"),
        (["mlp-3"], "mlp-3"),
        (["mlp-0", "resid_post-2"], "mlp-0+resid_post-2"),
        ([f"a-long-name-{i}x" for i in range(20)], "20-runs"),
    ],
)
def test_the_parent_is_named_after_its_runs(names: list[str], label: str) -> None:
    assert label_of(names) == label


def test_runs_of_a_file_may_differ_in_everything() -> None:
    runs = [
        {"mapping": "mlp", "layer": 1},
        {"mapping": "mlp", "layer": 1, "k": 2, "name": "sparser"},
        {"architecture": "matryoshka_sae", "layer": 2, "lr": 0.01},
    ]
    settings = resolve_many([_layer(**_COMMON)], each_of(None, None, runs))
    assert list(settings) == ["mlp-1", "sparser", "resid_post-2"]
    assert settings["sparser"].cfg.sae.k == 2
    assert settings["resid_post-2"].cfg.lr == 0.01
    with pytest.raises(ValueError, match="Two of the runs would be in a folder 'mlp-1'"):
        resolve_many([_layer(**_COMMON)], each_of(None, None, [runs[0], {**runs[0], "k": 2}]))


def test_each_run_has_its_folder_with_settings_metrics_and_evaluation(tmp_path: Path) -> None:
    results = train_many(_settings(), tmp_path / "p", log_every=2)
    assert list(results) == ["mlp-0", "mlp-1"]
    for name in results:
        folder = RunFolder(tmp_path / "p" / name)
        found = folder.read()
        assert found["completed_at"]
        assert found["layer"] == int(name[-1])
        assert [line["step"] for line in read_lines(folder.metrics_log)] == [1, 2, 4, 6]
        fvu = json.loads(folder.metrics.read_text())["prefixes"][-1]["fvu"]
        assert results[name].prefixes[-1].fvu == fvu
    assert train_many(_settings(), tmp_path / "p") == {}


def test_a_stopped_run_goes_on_with_the_same_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_many(_settings(), tmp_path / "straight")

    class Stopping(Keeper):
        def __call__(self, trainer: Any, output: Any) -> None:
            if trainer.n_training_steps == 3:
                self.stop.number = 15
            super().__call__(trainer, output)

    monkeypatch.setattr(layers_module, "Keeper", Stopping)
    with pytest.raises(RunStopped, match="after step 3"):
        train_many(_settings(), tmp_path / "p", log_every=1)
    monkeypatch.undo()
    torch.manual_seed(5)
    assert list(train_many(_settings(), tmp_path / "p", log_every=1)) == ["mlp-0", "mlp-1"]
    for name in ("mlp-0", "mlp-1"):
        ours, theirs = (
            load_file(tmp_path / parent / name / SAE_WEIGHTS_FILENAME) for parent in ("p", "straight")
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        log = read_lines(RunFolder(tmp_path / "p" / name).metrics_log)
        assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_runs_in_lockstep_are_resumed_together_as_they_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is refused alone; `runs` says that they train; W&B goes on with its run."""
    parent, statuses, wandb_ids = tmp_path / "p", [], []
    monkeypatch.setattr("wandb.init", lambda **settings: wandb_ids.append(settings["id"]))
    for name in ("log", "finish", "log_artifact"):
        monkeypatch.setattr(f"wandb.{name}", lambda *_args, **_kwargs: None)

    class Stopping(Keeper):
        def __call__(self, trainer: Any, output: Any) -> None:
            if trainer.n_training_steps == 4:
                statuses.extend(run.status for run in find_runs(tmp_path))
                self.stop.number = 15
            super().__call__(trainer, output)

    settings = {"log_to_wandb": True, "n_checkpoints": 5}
    upkeep = Upkeep(keep=0, checkpoint_minutes=0, skip_bad_batches=2)
    with monkeypatch.context() as patched:
        patched.setattr(layers_module, "Keeper", Stopping)
        with pytest.raises(RunStopped):
            train_many(_settings(**settings), parent, log_every=3, upkeep=upkeep)
    assert statuses == ["running", "running"]
    assert [run.status for run in find_runs(tmp_path)] == ["interrupted", "interrupted"]
    checkpoints = {path.name for path in (parent / "checkpoints").iterdir()}
    assert len(checkpoints) == 3  # more than are kept by default

    before = _files(parent)
    with pytest.raises(ValueError, match=f"To go on: saelens-matryoshka train --resume {parent}$"):
        resume_run(RunFolder(parent / "mlp-0"))
    assert _files(parent) == before

    assert list(resume_many(parent)) == ["mlp-0", "mlp-1"]
    assert {path.name for path in (parent / "checkpoints").iterdir()} > checkpoints
    log = read_lines(RunFolder(parent / "mlp-0").metrics_log)
    assert [line["step"] for line in log] == [1, 3, 6]
    assert len(wandb_ids) == 2
    assert len(set(wandb_ids)) == 1
    with pytest.raises(ValueError, match="holds finished runs"):
        resume_many(parent)


def test_runs_that_were_killed_while_they_were_saved_are_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has its weights then, and no settings beside them."""

    def killed(_: Any, sae: Any, folder: str, *__: Any) -> None:
        sae.save_inference_model(folder)
        raise KeyboardInterrupt

    train_many(_settings(), tmp_path / "straight")
    with monkeypatch.context() as patched:
        patched.setattr(PartRunner, "save_final_sae", killed)
        with pytest.raises(KeyboardInterrupt):
            train_many(_settings(), tmp_path / "p")
    weights = f"mlp-0/{SAE_WEIGHTS_FILENAME}"
    assert list(resume_many(tmp_path / "p")) == ["mlp-0", "mlp-1"]
    ours, theirs = (load_file(tmp_path / parent / weights) for parent in ("p", "straight"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("killed_in", [Keeper.__call__, RunFolder.write_config], ids=["step", "folder"])
def test_runs_that_were_killed_before_their_first_checkpoint_begin_again_together(
    killed_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which they were given, on which their batches depend; not in that of their names."""
    two = each_of(None, None, [{"mapping": "mlp", "layer": 2, "d_sae": 128}, {"mapping": "mlp", "layer": 0}])

    def train(parent: str) -> Any:
        return train_many(resolve_many([_layer(**_COMMON)], two), tmp_path / parent)

    def killed(*args: Any, **kwargs: Any) -> None:
        killed_in(*args, **kwargs)
        raise KeyboardInterrupt

    train("straight")
    with monkeypatch.context() as patched:
        patched.setattr(Keeper if killed_in is Keeper.__call__ else RunFolder, killed_in.__name__, killed)
        with pytest.raises(KeyboardInterrupt):
            train("p")
    if killed_in is RunFolder.write_config:
        with pytest.raises(ValueError, match="p has no run 'mlp-0'"):
            resume_many(tmp_path / "p")
        train("p")
    else:
        resume_many(tmp_path / "p")
    for name in ("mlp-0", "mlp-2"):
        ours, theirs = (load_file(tmp_path / one / name / SAE_WEIGHTS_FILENAME) for one in ("p", "straight"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_of_its_own_is_not_gone_on_with_in_lockstep(tmp_path: Path) -> None:
    settings = _settings("0")
    folder = RunFolder(tmp_path / "p" / "mlp-0")
    folder.path.mkdir(parents=True)
    folder.write_config(settings["mlp-0"], started_at="2026-01-01T00:00:00+00:00")
    with pytest.raises(ValueError, match="mlp-0 holds a run that is trained alone"):
        train_many(settings, tmp_path / "p")
    assert layers_module.runs_in(tmp_path / "p") == []


def test_other_settings_in_a_folder_are_refused(tmp_path: Path) -> None:
    train_many(_settings("0"), tmp_path / "p")
    with pytest.raises(ValueError, match=r"mlp-0 holds a run with other settings \(k: 4"):
        train_many(_settings("0-1", k=2), tmp_path / "p")
    assert not (tmp_path / "p" / "mlp-1").exists()


@pytest.mark.parametrize(
    ("setting", "value", "instead"),
    [("output_path", "out", "--out and --name choose"), ("resume_from_checkpoint", ".", "given again")],
)
def test_settings_that_are_of_a_run_alone_are_refused(setting: str, value: str, instead: str) -> None:
    with pytest.raises(ValueError, match=rf"--{setting} is of a run that is trained alone.*{instead}"):
        _settings("0", **{setting: value})


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path) -> None:
    settings = _settings()
    settings["mlp-1"].cfg.sae.d_in = 64
    with pytest.raises(ValueError, match="mlp-1: d_in=64, but hook"):
        train_many(settings, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    with pytest.raises(ValueError, match="raise n_batches_in_buffer"):
        train_many(_settings(n_batches_in_buffer=1), tmp_path / "p")
    assert not (tmp_path / "p").exists()
