"""How good is every prefix? Ours beside its fair rivals, SAELens's own and other people's dictionaries.

All contestants of a task see the same activations in the same order, keep the same number k of latents
per token, and are measured by `sm.evaluate` on the same held-out tokens, as the inference models they are
saved as. The fair rival of a prefix is a plain BatchTopK dictionary of the prefix's own width, trained at
the prefix's own L0.

    python -m benchmarks.quality                          # the embedded model; about 10 minutes on 2 cores
    python -m benchmarks.quality --peers --seeds 0 1 2    # with sparsify and dictionary_learning
    python -m benchmarks.quality --model gpt2 --layer 8 --dataset NeelNanda/pile-10k --d-sae 12288 --k 32

Writes quality.json, quality.md and quality.png to the folder given by --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from sae_lens import SAE
from sae_lens.load_model import load_model

from benchmarks import machine
from benchmarks.quality import contestants, peers, report
from benchmarks.quality.activations import Activations, collect
from benchmarks.quality.contestants import TASKS, Contestant, Sizes, Task
from benchmarks.quality.measure import Judge, Row
from benchmarks.quality.training import train
from saelens_matryoshka import tiny
from saelens_matryoshka.prefixes import inference_model

_BESIDE = ("rivals", "stock", "per-token")
_SHARES = (16, 4, 2, 1)  # the widths, as shares of d_sae


class Benchmark:
    """One run of the comparison."""

    def __init__(self, model: Any, activations: Activations, sizes: Sizes, args: argparse.Namespace) -> None:
        self.activations, self.sizes, self.args = activations, sizes, args
        self.judge = Judge(model, activations, n_ce_tokens=args.ce_tokens)
        self.console = Console()
        self.rows: list[Row] = []
        self.tried: list[dict[str, Any]] = []

    def run(self) -> None:
        """Train and measure all contestants that SAELens trains; `rows` grows."""
        for seed in self.args.seeds:
            for task in self.args.tasks:
                self._run_task(task, seed)

    def _run_task(self, task: Task, seed: int) -> None:
        hooks = self.activations.hooks
        ours = contestants.nested(task, self.sizes, hooks)
        nested = self._compete(ours, seed)
        if task == "sae" and "stock" in self.args.beside:
            self._compete(contestants.stock(self.sizes, hooks), seed)
        if task != "sae" and "per-token" in self.args.beside:
            self._compete(contestants.per_token(task, self.sizes, hooks), seed)
        prefixes = self.judge.validate(nested).prefixes if "rivals" in self.args.beside else []
        for prefix in prefixes:
            self._compete(contestants.rival(task, self.sizes, hooks, prefix.width, prefix.l0), seed)

    def _compete(self, contestant: Contestant, seed: int) -> SAE[Any]:
        """Train at every learning rate asked for, keep the best on the validation tokens, measure it."""
        started = time.monotonic()
        candidates = [contestant.at(contestant.lr * factor) for factor in self.args.lr_factors]
        trained = ((f"lr {candidate.lr:g}", self._train(candidate, seed)) for candidate in candidates)
        return self._choose_and_measure(
            contestant.name, contestant.task, seed, trained, len(candidates), started, contestant.rival_of
        )

    def _train(self, contestant: Contestant, seed: int) -> SAE[Any]:
        sae = train(
            contestant, self.activations, batch_size=self.args.batch, seed=seed, device=self.args.device
        )
        return inference_model(sae)

    def run_peers(self) -> None:
        """The same for the other tools."""
        folder = self.args.out / "peers"
        n_steps = len(self.activations) // self.args.batch
        jobs = list(peers.jobs(self.args.tasks, self.sizes, n_steps, self.args.batch, self.args.seeds))
        self.console.print(f"training {len(jobs)} dictionaries of other tools, by nox; logs in {folder}")
        peers.train(self.activations, jobs, folder)
        groups: dict[tuple[str, Task, int], list[peers.Job]] = defaultdict(list)
        for job in jobs:
            groups[job.label, job.task, job.seed].append(job)
        for (label, task, seed), members in groups.items():
            started = time.monotonic()
            loaded = (
                (_shown(job.settings), peers.load(job, self.activations.hooks, folder).to(self.args.device))
                for job in members
            )
            self._choose_and_measure(label, task, seed, loaded, len(members), started)

    def _choose_and_measure(
        self,
        name: str,
        task: Task,
        seed: int,
        candidates: Iterator[tuple[str, SAE[Any]]],
        n_candidates: int,
        started: float,
        rival_of: str | None = None,
    ) -> SAE[Any]:
        best: tuple[float, str, SAE[Any]] | None = None
        for settings, sae in candidates:
            fvu = float("nan")
            if n_candidates > 1:
                fvu = self.judge.validate(sae).prefixes[-1].fvu
                tried = {"contestant": name, "task": task, "seed": seed, "width": sae.cfg.d_sae}
                self.tried.append({**tried, "settings": settings, "validation_fvu": fvu})
            if best is None or fvu < best[0]:
                best = (fvu, settings, sae)
        assert best is not None
        _, settings, sae = best
        rows = self.judge.measure(
            sae, task=task, contestant=name, seed=seed, settings=settings, rival_of=rival_of
        )
        self.rows += rows
        figures = ", ".join(f"{row.width:,}: {row.fvu:.4f}" for row in rows)
        seconds = time.monotonic() - started
        self.console.print(
            f"{task}, seed {seed}: [bold]{name}[/] ({settings}) FVU {figures}; {seconds:.0f} s",
            highlight=False,
        )
        gc.collect()
        return sae


def _shown(settings: dict[str, Any]) -> str:
    names = {key: value for key, value in settings.items() if key in ("lr", "optimizer")}
    return (
        ", ".join(f"{key} {value:.3g}" if key == "lr" else str(value) for key, value in names.items())
        or "defaults"
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a model TransformerLens knows; default: the embedded tiny one")
    parser.add_argument("--dataset", help="text for --model, as datasets.load_dataset takes it")
    parser.add_argument("--layer", type=int, help="default: the middle one")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--beside",
        nargs="*",
        choices=_BESIDE,
        default=list(_BESIDE),
        help="what SAELens trains beside ours: the fair rival of every prefix, stock matryoshka_batchtopk,\n"
        "per-token TopK; default: all",
    )
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=800 * 1024, help="training tokens")
    parser.add_argument("--held-out-tokens", type=int, default=50_000)
    parser.add_argument("--validation-tokens", type=int, default=25_000)
    parser.add_argument("--ce-tokens", type=int, default=10_000, help="of the held-out ones; 0: no CE")
    parser.add_argument("--batch", type=int, default=1024, help="training tokens per step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--lr-factors",
        type=float,
        nargs="+",
        default=[1.0],
        help="train every contestant at these multiples of its learning rate, and keep the best",
    )
    parser.add_argument("--peers", action="store_true", help="also sparsify and dictionary_learning, by nox")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results/quality"))
    args = parser.parse_args(argv)
    if (args.model is None) != (args.dataset is None):
        parser.error("--model and --dataset go together: held-out text must suit the model.")
    if args.batch % 32:
        parser.error(f"--batch {args.batch} must be a multiple of 32.")
    args.tokens -= args.tokens % args.batch  # the same whole batches for everybody
    if args.tokens < 20 * args.batch:
        parser.error(f"--tokens must be at least {20 * args.batch}: 20 batches.")
    return args


def _model_and_text(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    if args.model is None:
        model = tiny.load_hooked_transformer().to(args.device)
        return model, tiny.text.dataset("train"), tiny.text.dataset("held_out")
    from datasets import load_dataset

    text = load_dataset(args.dataset, split="train", streaming=True)
    return load_model("HookedTransformer", args.model, args.device), text.skip(500), text.take(500)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = _arguments(argv)
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    started = time.monotonic()
    model, train_text, held_out_text = _model_and_text(args)
    layer = model.cfg.n_layers // 2 if args.layer is None else args.layer
    activations = collect(
        model,
        layer,
        train_text,
        held_out_text,
        n_tokens=args.tokens,
        n_validation=args.validation_tokens,
        n_held_out=args.held_out_tokens,
        context_size=min(256, model.cfg.n_ctx),
    )
    widths = tuple(sorted({max(1, args.d_sae // share) for share in _SHARES}))
    benchmark = Benchmark(model, activations, Sizes(model.cfg.d_model, args.k, widths), args)
    benchmark.run()
    _write(benchmark, args, layer, started)
    if args.peers:
        benchmark.run_peers()
        _write(benchmark, args, layer, started)


def _write(benchmark: Benchmark, args: argparse.Namespace, layer: int, started: float) -> None:
    minutes = (time.monotonic() - started) / 60
    gathered = report.lines(benchmark.rows)
    for table in report.tables(gathered):
        benchmark.console.print(table)
    caption = (
        f"{args.model or 'the embedded model'}, layer {layer}, d_sae {args.d_sae}, k {args.k}, "
        f"{args.tokens:,} training tokens in batches of {args.batch}, {args.held_out_tokens:,} held-out "
        f"tokens, cross-entropy on {args.ce_tokens:,} of them, seeds {args.seeds}; {minutes:.0f} minutes."
    )
    benchmark.console.print(caption, highlight=False)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine.describe(args.device),
        "settings": vars(args) | {"layer": layer, "minutes": minutes},
        "rows": [dataclasses.asdict(row) for row in benchmark.rows],
        "tried": benchmark.tried,
        "aims": [dataclasses.asdict(aim) | {"met": aim.met} for aim in report.aims(gathered)],
    }
    (args.out / "quality.json").write_text(json.dumps(result, indent=2, default=str))
    (args.out / "quality.md").write_text(f"{caption}\n\n{report.markdown(gathered)}")
    report.plot(gathered, args.out / "quality.png")
    benchmark.console.print(f"Wrote {args.out}/quality.json, .md and .png", highlight=False)


if __name__ == "__main__":
    main()
