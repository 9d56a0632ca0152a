"""Train dictionary_learning's SAEs on cached activations, with its own trainers. Runs in its environment.

    python train_dictionary_learning.py FOLDER

FOLDER is written by `benchmarks.quality.peers`: `activations.safetensors`, `check.safetensors` and
`dictionary_learning.json`, the jobs. `FOLDER/dictionary_learning/NAME` of each job gets
`weights.safetensors`, and `predictions.safetensors`: its own forward pass on the rows of the check.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import (
    MatryoshkaBatchTopKSAE,
    MatryoshkaBatchTopKTrainer,
)
from dictionary_learning.training import trainSAE
from safetensors.torch import load_file, save_file


def train(job: dict[str, Any], rows: torch.Tensor, check: torch.Tensor, folder: Path) -> None:
    """Train, save, and predict the rows of the check with what was saved."""
    n_steps = len(rows) // job["batch_size"]
    settings = {
        "steps": n_steps,
        "activation_dim": rows.shape[1],
        "dict_size": job["d_sae"],
        "k": job["k"],
        "layer": 0,
        "lm_name": "cached",
        "seed": job["seed"],
        "device": "cpu",
        # Its defaults are for long runs: 1000 steps until the learning rate is full and until the
        # threshold, without which the inference model keeps everything, starts to be followed, and then
        # an average over 1000 steps, which would end a short run with an L0 far from k.
        "warmup_steps": n_steps // 20,
        "decay_start": n_steps - n_steps // 4,
        "threshold_start_step": n_steps // 20,
        "threshold_beta": 1 - 20 / n_steps,
        **job["settings"],
    }
    if job["matryoshka"]:
        edges = [0, *job["widths"]]
        fractions = [(end - start) / job["d_sae"] for start, end in pairwise(edges)]
        settings |= {"trainer": MatryoshkaBatchTopKTrainer, "group_fractions": fractions}
    else:
        settings |= {"trainer": BatchTopKTrainer}
    out = folder / "dictionary_learning" / job["name"]
    trainSAE(
        data=iter(rows.split(job["batch_size"])),
        trainer_configs=[settings],
        steps=n_steps,
        save_dir=str(out),
        device="cpu",
    )
    saved = out / "trainer_0" / "ae.pt"
    dictionary = MatryoshkaBatchTopKSAE if job["matryoshka"] else BatchTopKSAE
    with torch.no_grad():
        predictions = dictionary.from_pretrained(saved)(check)
    weights = {name: tensor.contiguous() for name, tensor in torch.load(saved).items()}
    save_file(weights, out / "weights.safetensors")
    save_file({"predictions": predictions}, out / "predictions.safetensors")


def main() -> None:
    """Command line."""
    folder = Path(sys.argv[1])
    rows = load_file(folder / "activations.safetensors")["residual"]
    check = load_file(folder / "check.safetensors")["residual"]
    for job in json.loads((folder / "dictionary_learning.json").read_text()):
        train(job, rows, check, folder)


if __name__ == "__main__":
    main()
