"""How much of a known truth each dictionary finds: SAEs and transcoders on synthetic data.

Every contestant trains at its defaults, and again at the learning rate and decoder_init_norm that one sweep,
the same grid and budget for all, finds for it on a seed of its own (largest F1 + MCC). All contestants of a
seed see the same samples in the same order, and all are evaluated with thresholds scaled so that their L0
is k.

    python -m benchmarks.ground_truth
    python -m benchmarks.ground_truth --task transcoder
    python -m benchmarks.ground_truth --quick        # smaller and shorter, to see that it works
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETrainer,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class

import saelens_matryoshka as sm
from benchmarks import machine
from benchmarks.synthetic import World, sae_world, transcoder_world
from saelens_matryoshka.evaluation.ground_truth import GroundTruthResult, evaluate_ground_truth
from saelens_matryoshka.prefixes import inference_model

_STOCK_LR = 3e-4
# Held-out batches that set the thresholds; the others measure.
_CALIBRATION_BATCHES = 10


@dataclass(frozen=True)
class Sizes:
    """What all contestants of one run share."""

    d: int
    d_sae: int
    k: float
    widths: list[int]
    steps: int
    batch: int = 1024

    def sae_fields(self) -> dict[str, Any]:
        """Of every config."""
        return {"d_in": self.d, "d_sae": self.d_sae, "k": self.k}

    def nested_fields(self) -> dict[str, Any]:
        """Of every nested config."""
        return {**self.sae_fields(), "matryoshka_widths": self.widths}


@dataclass(frozen=True)
class Contestant:
    """A way to train a dictionary."""

    name: str
    config: Callable[[Sizes], Any]
    """makes the SAE's config"""
    runner: Callable[[Any, Sizes], dict[str, Any]] | None = None
    """makes the fields of the runner's config that are not SAELens's defaults"""
    changes: Mapping[str, float] = field(default_factory=dict)
    """learning rate and decoder_init_norm that differ from that"""

    def runner_fields(self, sae: Any, sizes: Sizes) -> dict[str, Any]:
        """Learning rate, and what else is not SAELens's default."""
        return {"lr": _STOCK_LR, **(self.runner(sae, sizes) if self.runner else {})}


def _recommended_runner(sae: Any, sizes: Sizes) -> dict[str, Any]:
    return sm.recommended_runner_fields(
        sae, training_tokens=sizes.steps * sizes.batch, train_batch_size_tokens=sizes.batch
    )


def sae_contestants() -> list[Contestant]:
    """SAELens's architectures, with its own runner defaults and with our recommended ones, and ours."""

    def batchtopk(sizes: Sizes) -> Any:
        return BatchTopKTrainingSAEConfig(**sizes.sae_fields())

    def stock(sizes: Sizes) -> Any:
        return MatryoshkaBatchTopKTrainingSAEConfig(**sizes.nested_fields())

    def plain(sizes: Sizes) -> Any:
        return sm.MatryoshkaTrainingSAEConfig(**sizes.nested_fields())

    def recommended(sizes: Sizes) -> Any:
        return sm.MatryoshkaTrainingSAEConfig.recommended(**sizes.nested_fields())

    return [
        Contestant("stock batchtopk", batchtopk),
        Contestant("stock matryoshka_batchtopk", stock),
        Contestant("matryoshka_sae, plain", plain),
        Contestant("stock matryoshka_batchtopk, our runner fields", stock, _recommended_runner),
        Contestant("matryoshka_sae, recommended", recommended, _recommended_runner),
    ]


def transcoder_contestants() -> list[Contestant]:
    """Transcoders have no stock twin: ours with an SAE's defaults, as recommended, and on one level."""
    target = {"hook_name_out": "target"}
    stock = MatryoshkaBatchTopKTrainingSAEConfig(d_in=1, d_sae=1, matryoshka_widths=[1])
    names = ("rescale_acts_by_decoder_norm", "decoder_init_norm")

    def as_sae(sizes: Sizes) -> Any:
        defaults = {name: getattr(stock, name) for name in names}
        return sm.MatryoshkaTrainingTranscoderConfig(**sizes.nested_fields(), **target, **defaults)

    def recommended(sizes: Sizes) -> Any:
        return sm.MatryoshkaTrainingTranscoderConfig.recommended(**sizes.nested_fields(), **target)

    def skip(sizes: Sizes) -> Any:
        return sm.MatryoshkaTrainingSkipTranscoderConfig.recommended(**sizes.nested_fields(), **target)

    def one_level(sizes: Sizes) -> Any:
        widths = {"matryoshka_widths": [sizes.d_sae]}
        return sm.MatryoshkaTrainingTranscoderConfig.recommended(**sizes.sae_fields(), **widths, **target)

    return [
        Contestant("matryoshka_transcoder, an SAE's defaults", as_sae),
        Contestant("matryoshka_transcoder, one level", one_level, _recommended_runner),
        Contestant("matryoshka_transcoder, recommended", recommended, _recommended_runner),
        Contestant("matryoshka_skip_transcoder, recommended", skip, _recommended_runner),
    ]


def train(contestant: Contestant, sizes: Sizes, world: World, seed: int) -> Any:
    """One training through SAELens's trainer."""
    torch.manual_seed(seed)
    config = contestant.config(sizes)
    runner = contestant.runner_fields(config, sizes)
    if "lr" in contestant.changes:
        runner["lr"] = contestant.changes["lr"]
    if "decoder_init_norm" in contestant.changes:
        config.decoder_init_norm = contestant.changes["decoder_init_norm"]
    settings: dict[str, Any] = {
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "save_final_checkpoint": False,
        "total_training_samples": sizes.steps * sizes.batch,
        "device": "cpu",
        "autocast": False,
        "lr_end": runner["lr"],
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "lr_decay_steps": 0,
        "n_restart_cycles": 1,
        "train_batch_size_samples": sizes.batch,
        "dead_feature_window": 1000,
        "feature_sampling_window": 10**9,
        "logger": LoggingConfig(log_to_wandb=False),
        "n_batches_for_norm_estimate": 1,
    }
    sae = get_sae_training_class(config.architecture())[0](config)
    trainer = SAETrainer(
        SAETrainerConfig(**{**settings, **runner}), sae, iter(world.train.split(sizes.batch))
    )
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off
        return trainer.fit()


@torch.no_grad()
def at_l0(sae: Any, source: torch.Tensor, l0: float) -> Any:
    """The inference model with its thresholds scaled by one factor so that its mean L0 on `source` is l0."""
    model = inference_model(sae)
    pre = (model.process_sae_in(source) @ model.W_enc + model.b_enc).relu()
    relative = (pre / model.threshold.clamp(min=1e-6)).flatten()
    model.threshold *= relative.topk(int(l0 * len(source)) + 1, sorted=False).values.min()
    return model


def measure(contestant: Contestant, sizes: Sizes, world: World, seed: int) -> tuple[GroundTruthResult, float]:
    """Train and evaluate once: the result, and the training's seconds."""
    started = time.perf_counter()
    sae = train(contestant, sizes, world, seed)
    seconds = time.perf_counter() - started
    calibration = torch.cat([batch.source for batch in world.held_out[:_CALIBRATION_BATCHES]])
    result = evaluate_ground_truth(
        at_l0(sae, calibration, sizes.k),
        world.held_out[_CALIBRATION_BATCHES:],
        world.directions,
        children=world.children,
        groups=world.groups,
    )
    return result, seconds


def sweep(
    contestant: Contestant,
    sizes: Sizes,
    world: World,
    seed: int,
    grid: list[tuple[float, float]],
    console: Console,
) -> tuple[Contestant, list[dict[str, Any]]]:
    """The contestant at the point of the grid with the largest F1 + MCC, and all points."""
    points = []
    for lr, norm in grid:
        changed = replace(contestant, changes={"lr": lr, "decoder_init_norm": norm})
        result, seconds = measure(changed, sizes, world, seed)
        point = {"lr": lr, "decoder_init_norm": norm, "f1": result.f1, "mcc": result.mcc}
        points.append({**point, "n_dead": result.n_dead, "seconds": seconds})
        console.print(
            f"  sweep: {contestant.name}, lr {lr:g}, norm {norm:g}: F1 {result.f1:.3f}, "
            f"MCC {result.mcc:.3f}, {result.n_dead} dead, {seconds:.0f} s",
            highlight=False,
        )
    best = max(points, key=lambda point: point["f1"] + point["mcc"])
    changes = {"lr": best["lr"], "decoder_init_norm": best["decoder_init_norm"]}
    return replace(contestant, changes=changes), points


# ---- output


def _summary(rows: list[dict[str, Any]], is_sae: bool) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: one line per contestant, mean and range over the seeds."""
    headings = ["contestant", "lr, norm", "F1", "MCC", "recovered", "dead", "FVU", "L0"]
    if is_sae:
        headings[4:4] = ["uniqueness", "absorption (alone)", "parents found"]
    table = []
    for name, group in itertools.groupby(rows, key=lambda row: (row["contestant"], row["tuned"])):
        results = [row["result"] for row in group]

        def column(field: str, digits: int = 3, results: list[Any] = results) -> str:
            return _spread([result[field] for result in results], digits)

        of = [row for row in rows if (row["contestant"], row["tuned"]) == name]
        cells = [
            _label(*name),
            f"{of[0]['lr']:g}, {of[0]['decoder_init_norm']:g}",
            column("f1"),
            column("mcc"),
        ]
        if is_sae:
            absorption, alone = column("absorption"), column("silent_alone")
            cells += [column("uniqueness", 2), f"{absorption} ({alone})", column("n_parents_found", 0)]
        recovered = f"{column('n_recovered', 0)} of {results[0]['n_features']}"
        cells += [recovered, column("n_dead", 0), _spread([r["fvu"][-1] for r in results]), column("l0", 2)]
        table.append(cells)
    return headings, table


def _landing(rows: list[dict[str, Any]], widths: list[int]) -> tuple[list[str], list[list[str]]]:
    """Where the features of each group land, summed over the seeds."""
    headings = ["contestant", "group", "features", "found", "recovered", "mean F1"]
    headings += [f"in {width}" for width in widths]
    table = []
    for key, group in itertools.groupby(rows, key=lambda row: (row["contestant"], row["tuned"])):
        results = [row["result"]["groups"] for row in group]
        for name in results[0]:
            of = [result[name] for result in results]
            landing = [sum(column) for column in zip(*(group["landing"] for group in of), strict=True)]
            if len(landing) < len(widths):  # one level
                landing = [""] * (len(widths) - 1) + landing
            table.append(
                [
                    _label(*key),
                    name,
                    *(str(sum(group[f] for group in of)) for f in ("n_features", "n_found", "n_recovered")),
                    f"{statistics.mean(group['mean_f1'] for group in of):.3f}",
                    *map(str, landing),
                ]
            )
    return headings, table


def _spread(values: list[Any], digits: int = 3) -> str:
    if any(value is None for value in values):
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return mean if low == high else f"{mean} [{low}, {high}]"


def _label(name: str, tuned: bool) -> str:
    return name + (", tuned" if tuned else "")


def _rich(title: str, headings: list[str], cells: list[list[str]]) -> Table:
    """For the terminal, where the contestants' names are too long for a column: a letter for each."""
    letters = {name: chr(ord("A") + i) for i, name in enumerate(dict.fromkeys(row[0] for row in cells))}
    table = Table(title=title, caption="\n".join(f"{letter}: {name}" for name, letter in letters.items()))
    for heading in ["", *headings[1:]]:
        table.add_column(heading, justify="left" if heading in ("", "group") else "right")
    for row in cells:
        table.add_row(letters[row[0]], *row[1:])
    return table


def _markdown(headings: list[str], cells: list[list[str]]) -> str:
    align = ["---" if heading in ("contestant", "group") else "---:" for heading in headings]
    return "\n".join(f"| {' | '.join(row)} |" for row in [headings, align, *cells])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task", choices=("sae", "transcoder"), default="sae")
    parser.add_argument("--d", type=int, default=96)
    parser.add_argument("--d-sae", type=int, default=384)
    parser.add_argument(
        "--k", type=float, help="default: 6 for SAEs (7.5 features fire), 4 for transcoders (3.9)"
    )
    parser.add_argument("--widths", type=int, nargs="+", help="default: 1/16, 1/4, 1/2 and all of d_sae")
    parser.add_argument("--steps", type=int, default=768, help="of 1024 samples")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuning-seed", type=int, default=100)
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--norm", type=float, nargs="+", default=[0.1, 1.0], help="decoder_init_norm")
    parser.add_argument("--only", nargs="+", help="contestants whose name contains one of these")
    parser.add_argument("--quick", action="store_true", help="60 steps, one seed, a grid of two points")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--markdown", type=Path, help="where to write the tables")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds, args.lr, args.norm = min(args.steps, 60), [0], [2e-3, 8e-3], [1.0]
    if args.tuning_seed in args.seeds:
        parser.error(f"--tuning-seed {args.tuning_seed} is one of --seeds: tune on another.")
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    is_sae = args.task == "sae"
    sizes = Sizes(
        args.d,
        args.d_sae,
        args.k or (6 if is_sae else 4),
        args.widths or [args.d_sae // part for part in (16, 4, 2, 1)],
        args.steps,
    )
    contestants = sae_contestants() if is_sae else transcoder_contestants()
    if args.only:
        contestants = [c for c in contestants if any(part in c.name for part in args.only)]
    grid = list(itertools.product(args.lr, args.norm))
    console = Console()

    def world(seed: int) -> World:
        started = time.perf_counter()
        made = (sae_world if is_sae else transcoder_world)(seed, sizes.steps * sizes.batch, d=sizes.d)
        console.print(f"seed {seed}: sampled in {time.perf_counter() - started:.0f} s", highlight=False)
        return made

    tuned, sweeps = [], {}
    tuning_world = world(args.tuning_seed)
    for contestant in contestants:
        best, sweeps[contestant.name] = sweep(
            contestant, sizes, tuning_world, args.tuning_seed, grid, console
        )
        tuned.append(best)
    description = tuning_world.description
    del tuning_world
    entries = [entry for pair in zip(contestants, tuned, strict=True) for entry in pair]
    measured: dict[int, list[dict[str, Any]]] = {i: [] for i in range(len(entries))}
    for seed in args.seeds:
        its_world = world(seed)
        for i, entry in enumerate(entries):
            result, seconds = measure(entry, sizes, its_world, seed)
            console.print(
                f"  seed {seed}: {entry.name}{', tuned' if entry.changes else ''}: F1 {result.f1:.3f}, "
                f"MCC {result.mcc:.3f}, {seconds:.0f} s",
                highlight=False,
            )
            measured[i].append({"seed": seed, "seconds": seconds, "result": result.to_dict()})
    rows = []
    for i, entry in enumerate(entries):
        config = entry.config(sizes)
        runner = entry.runner_fields(config, sizes)
        settings = {"lr": runner["lr"], "decoder_init_norm": config.decoder_init_norm, **entry.changes}
        rows += [
            {"contestant": entry.name, "tuned": bool(entry.changes), **settings, **one} for one in measured[i]
        ]
    title = (
        f"{description}; d_sae {sizes.d_sae}, k {sizes.k:g}, {sizes.steps * sizes.batch:,} samples, "
        f"mean [least, largest] of seeds {args.seeds}"
    )
    tables = [_summary(rows, is_sae), _landing(rows, sizes.widths)]
    for (headings, cells), heading in zip(tables, (title, "where found features land"), strict=True):
        console.print(_rich(heading, headings, cells))
    described = machine.describe("cpu")
    console.print(described)
    if args.markdown:
        text = "\n\n".join([title, *(_markdown(*table) for table in tables)])
        args.markdown.write_text(text + "\n")
    if args.json:
        figures = {"machine": described, "settings": vars(args), "world": description}
        args.json.write_text(json.dumps({**figures, "sweeps": sweeps, "rows": rows}, indent=2, default=str))


if __name__ == "__main__":
    main()
