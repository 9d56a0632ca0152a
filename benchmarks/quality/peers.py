"""Other people's dictionaries, trained in their own environments on exactly the same activations.

The training rows are written once. For each tool a nox session makes the environment and runs its script
in `peer_scripts/`, which trains with the tool's own trainer and saves in the tool's own format. What comes
back is rebuilt as a SAELens object, checked against the tool's own forward pass, and then measured by the
same code as everything else.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, SkipTranscoder, SkipTranscoderConfig
from sae_lens.saes.topk_sae import TopK
from safetensors.torch import load_file, save_file

from benchmarks.quality.activations import Activations, Hooks
from benchmarks.quality.contestants import Sizes, Task, locate

N_CHECKED_ROWS = 1000
PARITY = 1e-4
"""Largest difference from the tool's own forward pass, relative to its largest prediction"""


@dataclass(frozen=True)
class Job:
    """One dictionary for a tool to train."""

    peer: str
    """"sparsify" or "dictionary_learning\""""
    name: str
    """of its folder"""
    label: str
    """contestant it belongs to; of several jobs with one label the best on the validation tokens counts"""
    task: Task
    seed: int
    k: int
    widths: list[int]
    matryoshka: bool
    batch_size: int
    settings: dict[str, Any]
    """given to the tool as they are; empty: its defaults"""

    def to_dict(self) -> dict[str, Any]:
        """As the scripts read it."""
        fields = dataclasses.asdict(self)
        return {**fields, "d_sae": self.widths[-1], "skip": self.task == "skip_transcoder"}


def jobs(tasks: list[Task], sizes: Sizes, n_steps: int, batch_size: int, seeds: list[int]) -> Iterator[Job]:
    """All jobs of both tools.

    Each tool runs at its defaults, and "tuned": the best of the learning rates tried, for sparsify also of
    two optimizers, since its own learning rate is meant for runs of many more steps.
    """
    signum = 5e-3 / (sizes.d_sae / 2**14) ** 0.5  # sparsify's default learning rate
    adam = 2e-4 / (sizes.d_sae / 2**14) ** 0.5  # that of both tools with Adam
    warmup = {"lr_warmup_steps": n_steps // 20}
    sparsify_grid: list[dict[str, Any]] = [{"lr": signum / 4}, {"lr": signum / 2}]
    sparsify_grid += [{"optimizer": "adam", "lr": adam * factor, **warmup} for factor in (8, 16, 32)]
    dictionary_learning_grid: list[dict[str, Any]] = [{"lr": adam * factor} for factor in (4, 8, 16)]

    def one(peer: str, label: str, task: Task, seed: int, settings: dict[str, Any], nested: bool) -> Job:
        chosen = f"{settings.get('optimizer', 'lr')}-{settings['lr']:.3g}" if settings else "defaults"
        name = f"{task}-{'matryoshka' if nested else 'plain'}-{chosen}-seed{seed}"
        widths = list(sizes.widths) if nested else [sizes.d_sae]
        label += ", tuned" if settings else ", defaults"
        return Job(peer, name, label, task, seed, int(sizes.k), widths, nested, batch_size, settings)

    for seed, task in itertools.product(seeds, tasks):
        if task != "sae":
            for settings in ({}, *sparsify_grid):
                yield one("sparsify", "sparsify TopK", task, seed, settings, nested=False)
            continue
        for kind, nested in (("Matryoshka BatchTopK", True), ("BatchTopK", False)):
            for settings in ({}, *dictionary_learning_grid):
                yield one("dictionary_learning", f"dictionary_learning {kind}", task, seed, settings, nested)


def train(activations: Activations, all_jobs: list[Job], folder: Path) -> None:
    """Have the tools train their jobs, in environments made by nox, and leave the results in `folder`.

    Raises:
        RuntimeError: an environment could not be made, or a script failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    activations.save(folder / "activations.safetensors")
    check = {
        "source": activations.source[:N_CHECKED_ROWS].contiguous(),
        "residual": activations.residual[:N_CHECKED_ROWS].contiguous(),
    }
    save_file(check, folder / "check.safetensors")
    for peer in dict.fromkeys(job.peer for job in all_jobs):
        own = [job.to_dict() for job in all_jobs if job.peer == peer]
        (folder / f"{peer}.json").write_text(json.dumps(own, indent=2))
        session = [sys.executable, "-m", "nox", "--session", f"quality_{peer}", "--", str(folder.resolve())]
        log = folder / f"{peer}.log"
        with log.open("w") as output:
            failed = subprocess.run(session, stdout=output, stderr=subprocess.STDOUT).returncode
        if failed:
            end = log.read_text()[-2000:]
            raise RuntimeError(f"nox session quality_{peer} failed. The end of its output, {log}:\n{end}")
    (folder / "activations.safetensors").unlink()


def load(job: Job, hooks: Hooks, folder: Path) -> SAE[Any]:
    """What a job trained, as a SAELens object that reads the raw hook.

    Raises:
        ValueError: it does not predict what the tool's own forward pass predicts.
    """
    out = folder / job.peer / job.name
    check = load_file(folder / "check.safetensors")
    own = load_file(out / "predictions.safetensors")["predictions"]
    if job.peer == "sparsify":
        sae = sparsify_transcoder(load_file(out / "mlp" / "sae.safetensors"), job.k)
        _require_parity(job, sae(check["source"]), own)
        _fold_gain(sae, hooks)
    else:
        sae = dictionary_learning_sae(load_file(out / "weights.safetensors"))
        _require_parity(job, sae(check["residual"]), own)
    locate(sae.cfg.metadata, job.task, hooks)
    return sae


def sparsify_transcoder(weights: dict[str, torch.Tensor], k: int) -> SkipTranscoder:
    """A transcoder saved by sparsify, which selects the k largest latents of each token.

    Without a skip in the weights, its W_skip stays 0.
    """
    d_sae, d_in = weights["encoder.weight"].shape
    d_out = weights["W_dec"].shape[1]
    sae = SkipTranscoder(
        SkipTranscoderConfig(d_in=d_in, d_out=d_out, d_sae=d_sae, apply_b_dec_to_input=False)
    )
    sae.activation_fn = TopK(k)
    _fill(
        sae,
        W_enc=weights["encoder.weight"].T,
        b_enc=weights["encoder.bias"],
        W_dec=weights["W_dec"],
        b_dec=weights["b_dec"],
        W_skip=weights.get("W_skip", torch.zeros(d_out, d_in)),
    )
    return sae


def dictionary_learning_sae(weights: dict[str, torch.Tensor]) -> JumpReLUSAE:
    """A (Matryoshka) BatchTopK SAE saved by dictionary_learning."""
    nested = "W_enc" in weights
    W_enc = weights["W_enc"] if nested else weights["encoder.weight"].T
    d_in, d_sae = W_enc.shape
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=True))
    _fill(
        sae,
        W_enc=W_enc,
        b_enc=weights["b_enc" if nested else "encoder.bias"],
        W_dec=weights["W_dec"] if nested else weights["decoder.weight"].T,
        b_dec=weights["b_dec"],
        threshold=weights["threshold"].expand(d_sae),
    )
    if nested:
        sae.cfg.metadata.matryoshka_widths = list(itertools.accumulate(weights["group_sizes"].tolist()))
    return sae


@torch.no_grad()
def _fill(sae: SAE[Any], **tensors: torch.Tensor) -> None:
    parameters = dict(sae.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


@torch.no_grad()
def _require_parity(job: Job, ours: torch.Tensor, own: torch.Tensor) -> None:
    difference = ((ours - own).abs().max() / own.abs().max()).item()
    if not difference < PARITY:
        raise ValueError(
            f"{job.peer} {job.name}: rebuilt from its weights it differs from its own forward pass by "
            f"{difference:.2g} of the largest prediction, more than {PARITY:g}."
        )


@torch.no_grad()
def _fold_gain(sae: SkipTranscoder, hooks: Hooks) -> None:
    """From the MLP's true input, which it was trained on, to the raw hook that evaluation reads."""
    if hooks.source.offset is not None:
        sae.b_enc += hooks.source.offset @ sae.W_enc
        sae.b_dec += sae.W_skip @ hooks.source.offset
    if hooks.source.gain is not None:
        sae.W_enc *= hooks.source.gain[:, None]
        sae.W_skip *= hooks.source.gain
