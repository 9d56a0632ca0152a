"""Checkpoints of research repositories compute what their code does in evaluation mode."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import SAE

import saelens_matryoshka as sm
from saelens_matryoshka.formats import Folder, FormatError, converter
from saelens_matryoshka.formats.export import import_models
from saelens_matryoshka.formats.matryoshka_checkpoint import items
from tests.formats.coders import LATENTS, D, inputs

SAE_CONFIG = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre",
    "sae_type": "global-matryoshka-topk",
    "dict_size": LATENTS,
    "group_sizes": [8, 16, 24],
    "top_k": 5,
    "input_unit_norm": True,
    "seq_len": 128,
    "dtype": "torch.float32",
}
TRANSCODER_CONFIG = {
    "model_name": "gemma-2-2b",
    "source_hook_point": "blocks.8.ln2.hook_normalized",
    "target_hook_point": "blocks.8.hook_mlp_out",
    "prefix_sizes": [8, 16, 24],
    "input_unit_norm": False,
}


def _write(
    folder: Path, config: dict[str, Any], name: str = "sae.pt", d_out: int = D
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.randn(D, LATENTS, generator=generator),
        "b_enc": torch.randn(LATENTS, generator=generator),
        "W_dec": torch.randn(LATENTS, d_out, generator=generator),
        "b_dec": torch.randn(d_out, generator=generator),
        "threshold": torch.tensor(0.7),
    }
    if config.get("sae_type") == "topk":
        del tensors["threshold"]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def _theirs(config: dict[str, Any], tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The forward pass in evaluation mode, from the description of the fields."""
    mean, std = torch.zeros(1), torch.ones(1)
    if config["input_unit_norm"]:
        mean = x.mean(dim=-1, keepdim=True)
        std = x.std(dim=-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    if "hook_point" in config:
        x = x - tensors["b_dec"]
    acts = (x @ tensors["W_enc"] + tensors["b_enc"]).relu()
    if config.get("sae_type") == "topk":
        top = acts.topk(config["top_k"], dim=-1)
        acts = torch.zeros_like(acts).scatter(-1, top.indices, top.values)
    else:
        acts = torch.where(acts > tensors["threshold"], acts, 0)
    return (acts @ tensors["W_dec"] + tensors["b_dec"]) * std + mean


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("config", [SAE_CONFIG, SAE_CONFIG | {"sae_type": "topk"}, TRANSCODER_CONFIG])
def test_it_computes_what_the_repository_does(
    tmp_path: Path, config: dict[str, Any], unit_norm: bool
) -> None:
    config = config | {"input_unit_norm": unit_norm}
    tensors = _write(tmp_path / "run", config)
    sae = SAE.load_from_disk(tmp_path / "run", converter=converter("matryoshka-checkpoint"))
    x = 2 * inputs() + 0.5
    torch.testing.assert_close(sae(x), _theirs(config, tensors, x))
    assert sm.matryoshka_widths(sae) == [8, 24, 48]
    if config.get("sae_type") != "topk":
        narrow = sm.truncate(sae, 24)
        kept = {"W_enc": tensors["W_enc"][:, :24], "b_enc": tensors["b_enc"][:24]}
        kept |= {"W_dec": tensors["W_dec"][:24]}
        torch.testing.assert_close(narrow(x), _theirs(config, tensors | kept, x))


def test_a_transcoder_may_change_the_width(tmp_path: Path) -> None:
    tensors = _write(tmp_path / "run", TRANSCODER_CONFIG, d_out=8)
    sae = SAE.load_from_disk(tmp_path / "run" / "sae.pt", converter=converter("matryoshka-checkpoint"))
    x = inputs()
    torch.testing.assert_close(sae(x), _theirs(TRANSCODER_CONFIG, tensors, x))
    assert sae.cfg.metadata.hook_name_out == "blocks.8.hook_mlp_out"


def test_the_final_checkpoint_of_a_run_is_read_and_otherwise_the_last(tmp_path: Path) -> None:
    steps = {name: tmp_path / "run" / "checkpoints" / f"{name}.pt" for name in ("step_900", "step_10000")}
    for step, path in steps.items():
        tensors = _write(tmp_path / "run", TRANSCODER_CONFIG, f"checkpoints/{step}.pt")
        torch.save(tensors | {"b_dec": torch.full((D,), float(step[5:]))}, path)
    assert items(Folder(tmp_path), "run") == ["run"]
    load = converter("matryoshka-checkpoint")
    assert SAE.load_from_disk(tmp_path / "run", converter=load).b_dec[0] == 10000
    _write(tmp_path / "run", TRANSCODER_CONFIG, "checkpoints/final.pt")
    assert SAE.load_from_disk(tmp_path / "run", converter=load).b_dec[0] != 10000


def test_a_dict_size_that_was_never_built_is_noticed(tmp_path: Path) -> None:
    _write(tmp_path / "run", SAE_CONFIG | {"dict_size": 18432})
    with pytest.warns(UserWarning, match="dict_size=18432, but the checkpoint has 48 latents"):
        SAE.load_from_disk(tmp_path / "run", converter=converter("matryoshka-checkpoint"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_sizes": [8, 16]}, "fits d_sae=48 in neither reading"),
        ({"sae_type": "topk", "top_k": 0}, "top_k=0"),
        ({"sae_type": "jumprelu"}, "logarithms"),
        ({"hook_point": None}, "nothing tells which hook"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_checkpoint_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    _write(tmp_path / "run", SAE_CONFIG | changes)
    with pytest.raises(FormatError, match=message):
        SAE.load_from_disk(tmp_path / "run", converter=converter("matryoshka-checkpoint"))


def test_a_wandb_artifact_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    asked: list[str] = []

    def artifact(name: str) -> Any:
        asked.append(name)
        if "missing" in name:
            raise wandb.errors.CommError("artifact not found")
        return SimpleNamespace(download=lambda root: _write(Path(root), TRANSCODER_CONFIG))

    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(artifact=artifact))
    models = import_models("me/project/run-8:v3", "matryoshka-checkpoint", tmp_path / "out")
    assert asked == ["me/project/run-8:v3"]
    assert [model.name for model in models] == ["layer_8"]
    assert sm.matryoshka_widths(SAE.load_from_disk(tmp_path / "out")) == [8, 24, 48]
    with pytest.raises(FormatError, match="'me/project/missing:latest' cannot be had: artifact not found"):
        import_models("wandb:me/project/missing:latest", "matryoshka-checkpoint", tmp_path / "x")


def test_wandb_still_has_what_is_called() -> None:
    """If this fails, W&B's client gives artifacts in another way than they are read here."""
    import inspect

    import wandb

    assert "name" in inspect.signature(wandb.Api.artifact).parameters
    assert "root" in inspect.signature(wandb.Artifact.download).parameters
    assert issubclass(wandb.errors.CommError, wandb.Error)
