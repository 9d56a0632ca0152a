"""Train sparsify's transcoders on cached activations, with sparsify's own trainer. Runs in its environment.

sparsify's trainer reads a module's input and output while a language model runs. Here the language model is
a replay: its "tokens" are row numbers, and its one module takes the source rows in and gives the target
rows out. All else (initialisation, optimizer, schedule, saving) is sparsify's.

    python train_sparsify.py FOLDER

FOLDER is written by `benchmarks.quality.peers`: `activations.safetensors`, `check.safetensors` and
`sparsify.json`, the jobs. `FOLDER/sparsify/NAME` of each job gets the saved transcoder, and
`predictions.safetensors`: its own forward pass on the rows of the check.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
from torch import nn
from torch.utils.data import Dataset

MODULE = "mlp"
TOKENS_PER_SEQUENCE = 32


class Lookup(nn.Module):
    """Takes source rows in and gives the target rows of the same tokens out."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def forward(self, source: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return self.target[rows]


class Replay(nn.Module):
    """What sparsify's trainer needs of a language model, over cached rows."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        super().__init__()
        self.source = source
        self.mlp = Lookup(target)
        self.device = source.device
        self.dummy_inputs = {"input_ids": torch.zeros((1, 1), dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        """Where the hooked module is looked up."""
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.source[input_ids], input_ids)


class Rows(Dataset):  # type: ignore[type-arg]
    """Row numbers in order, as sequences of "tokens"."""

    def __init__(self, n_rows: int) -> None:
        self.sequences = torch.arange(n_rows).view(-1, TOKENS_PER_SEQUENCE)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.sequences[index]}


def train(job: dict[str, Any], rows: dict[str, torch.Tensor], check: torch.Tensor, folder: Path) -> None:
    """Train, save, and predict the rows of the check with what was saved."""
    n_rows = len(rows["source"])
    trainer = Trainer(
        TrainConfig(
            SparseCoderConfig(
                num_latents=job["d_sae"], k=job["k"], transcode=True, skip_connection=job["skip"]
            ),
            batch_size=job["batch_size"] // TOKENS_PER_SEQUENCE,
            hookpoints=[MODULE],
            init_seeds=[job["seed"]],
            save_every=n_rows,
            save_dir=str(folder / "sparsify"),
            run_name=job["name"],
            log_to_wandb=False,
            **job["settings"],
        ),
        Rows(n_rows),  # type: ignore[arg-type]
        Replay(rows["source"], rows["target"]),  # type: ignore[arg-type]
    )
    trainer.fit()
    out = folder / "sparsify" / job["name"]
    coder = SparseCoder.load_from_disk(out / MODULE)
    with torch.no_grad():
        predictions = coder(check, torch.zeros_like(check)).sae_out
    save_file({"predictions": predictions}, out / "predictions.safetensors")


def main() -> None:
    """Command line."""
    folder = Path(sys.argv[1])
    rows = load_file(folder / "activations.safetensors")
    check = load_file(folder / "check.safetensors")["source"]
    for job in json.loads((folder / "sparsify.json").read_text()):
        train(job, rows, check, folder)


if __name__ == "__main__":
    main()
