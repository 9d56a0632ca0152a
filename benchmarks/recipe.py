"""What was tried to make the nested transcoder better, and what each idea is worth.

Every variant changes one thing of the recommended settings. All see the same activations in the same order
and are measured on the same held-out tokens, as the inference models they are saved as. Shown is a variant's
FVU over that of the recommended settings with the same seed: below 1 is better.

    python -m benchmarks.recipe                       # the embedded model, three seeds; about 15 minutes
    python -m benchmarks.recipe --only progressive

Writes recipe.json to the folder given by --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from typing_extensions import override

import saelens_matryoshka as sm
from benchmarks import machine
from benchmarks.quality.activations import Activations, collect
from benchmarks.quality.contestants import Contestant, locate
from benchmarks.quality.training import train
from saelens_matryoshka import tiny
from saelens_matryoshka.prefixes import inference_model

_LAYER, _D, _K, _WIDTHS, _BATCH = 2, 128, 16, (64, 256, 512, 1024), 1024
_N_TOKENS, _N_VALIDATION, _N_HELD_OUT = 800 * _BATCH, 1024, 32768
_RECOMMENDED, _PLAIN = "recommended", "one level only (no nesting)"


class Tried(sm.MatryoshkaTrainingTranscoder):
    """A transcoder whose settings may change while it trains."""

    n_steps: int
    model: Any

    def before_step(self, part: float) -> None:
        """Called with the part of the run that is over, from 0 to 1."""

    def penalty(self) -> torch.Tensor | None:
        """Added to the loss."""

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self.before_step(step_input.n_training_steps / self.n_steps)
        output = super().training_forward_pass(step_input)
        penalty = self.penalty()
        if penalty is not None:
            output.loss = output.loss + penalty
        return output


class LateWeights(Tried):
    """Equal weights first; between half and 0.8 of the run the prefixes' fall to 0.4."""

    @override
    def before_step(self, part: float) -> None:
        prefix = 1 - 0.6 * min(1.0, max(0.0, (part - 0.5) / 0.3))
        self.cfg.level_weights = [prefix] * (len(_WIDTHS) - 1) + [1.0]


class EqualRelative(Tried):
    """Each level weighs the inverse of its own loss, so that relative gains count the same in each."""

    _mean: torch.Tensor | None = None

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super().training_forward_pass(step_input)
        names = [f"inner_mse_loss_{width}" for width in _WIDTHS[:-1]] + ["mse_loss"]
        losses = torch.stack([output.losses[name].detach() for name in names])
        self._mean = losses if self._mean is None else torch.lerp(self._mean, losses, 0.05)
        weights = self._mean.reciprocal()
        self.cfg.level_weights = (weights / weights.max()).tolist()
        return output


class Progressive(Tried):
    """Levels join one after the other, at 15, 30 and 50% of the run; those before go on learning."""

    starts = (0.0, 0.15, 0.3, 0.5)
    k_of_stage: tuple[float, ...] | None = None
    orthogonal = False
    _stage = -1

    @override
    @torch.no_grad()
    def before_step(self, part: float) -> None:
        stage = sum(part >= start for start in self.starts) - 1
        if stage == self._stage:
            return
        joined = _WIDTHS[self._stage] if self._stage >= 0 else 0
        if joined:
            self.b_enc[joined : _WIDTHS[stage]] = self.b_enc[:joined].mean()
            if self.orthogonal:
                self._turn_away(joined, _WIDTHS[stage])
        self.b_enc[_WIDTHS[stage] :] = -1e6  # never selected
        self.cfg.level_weights = [1.0] * (stage + 1) + [0.0] * (len(_WIDTHS) - 1 - stage)
        if self.k_of_stage is not None:
            self.cfg.k = self.k_of_stage[stage]
        self._stage = stage

    def _turn_away(self, old: int, new: int) -> None:
        """Take from each new decoder row its part along the main directions of the old ones."""
        rank = min(old, self.W_dec.shape[1] // 2)
        main = torch.linalg.svd(self.W_dec[:old], full_matrices=False)[2][:rank]
        rows = self.W_dec[old:new]
        turned = rows - (rows @ main.T) @ main
        self.W_dec[old:new] = F.normalize(turned, dim=1) * rows.norm(dim=1, keepdim=True)


class ProgressiveWithK(Progressive):
    """The same, with the k that a prefix of the joint run uses."""

    k_of_stage = (4.5, 8.5, 11.5, 16.0)


class ProgressiveOrthogonal(ProgressiveWithK):
    """The same, new latents starting orthogonal to the old."""

    orthogonal = True


class OrthogonalDecoder(Tried):
    """A penalty on positive cosines between the decoder rows of a level and those of the levels before."""

    coefficient = 0.01

    @override
    def penalty(self) -> torch.Tensor:
        rows = F.normalize(self.W_dec, dim=1)
        total = rows.new_zeros(())
        for before, width in itertools.pairwise(_WIDTHS):
            cosines = rows[:before] @ rows[before:width].T
            total = total + cosines.relu().square().sum() / (width - before)
        return self.coefficient * total


class MoreOrthogonalDecoder(OrthogonalDecoder):
    """The same, ten times as strong."""

    coefficient = 0.1


class ResponseDecoder(Tried):
    """Decoder rows start as the MLP's response to a step along the encoder's."""

    @override
    def prepare_for_training(self, batch: torch.Tensor) -> None:
        super().prepare_for_training(batch)
        source, _ = self.split_batch(batch)
        block, mean = self.model.blocks[_LAYER], source.mean(dim=0)
        step = (source - mean).norm(dim=1).mean() * F.normalize(self.W_enc.detach().T, dim=1)
        with torch.no_grad():
            moved = block.ln2_post(block.mlp(torch.stack([mean, *(mean + step)])[None]))[0]
            norms = self.W_dec.norm(dim=1, keepdim=True)
            self.W_dec.data = F.normalize(moved[1:] - moved[0], dim=1) * norms


class ZeroDecoder(Tried):
    """The decoder starts at zero, the encoder where it is."""

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_dec.data.zero_()


class AnnealedK(Tried):
    """Four times k at the start, k from a quarter of the run on."""

    @override
    def before_step(self, part: float) -> None:
        self.cfg.k = _K * (4 - 3 * min(1.0, part / 0.25))


@dataclass(frozen=True)
class Variant:
    """One thing changed."""

    name: str
    sae_class: type[Tried] = Tried
    fields: dict[str, Any] = field(default_factory=dict)
    lr_factor: float = 1.0


VARIANTS = (
    Variant(_RECOMMENDED),
    Variant(_PLAIN),
    Variant("level weights ¼ ¼ ½ 1", fields={"level_weights": [0.25, 0.25, 0.5, 1.0]}),
    Variant("prefix weights fall late to 0.4", LateWeights),
    Variant("level weights 1 / own loss", EqualRelative),
    Variant("progressive stages", Progressive),
    Variant("progressive stages, k of each", ProgressiveWithK),
    Variant("progressive, k of each, orthogonal start", ProgressiveOrthogonal),
    Variant("decoder orthogonality 0.01", OrthogonalDecoder),
    Variant("decoder orthogonality 0.1", MoreOrthogonalDecoder),
    Variant("decoder from the MLP's response", ResponseDecoder),
    Variant("decoder from zero", ZeroDecoder),
    Variant("selection times decoder norm", fields={"rescale_acts_by_decoder_norm": True}),
    Variant("k annealed from 4 k", AnnealedK),
    Variant("aux loss per level", fields={"use_matryoshka_aux_loss": True}),
    Variant("no aux loss", fields={"aux_loss_coefficient": 0.0}),
    Variant("aux_k 4", fields={"aux_k": 4}),
    Variant("half the learning rate", lr_factor=0.5),
    Variant("twice the learning rate", lr_factor=2.0),
)


def measure(
    variant: Variant, activations: Activations, model: Any, seed: int
) -> tuple[dict[int, float], float]:
    """FVU of every prefix on held-out tokens, and the share of dead latents."""
    hooks = activations.hooks
    config = sm.MatryoshkaTrainingTranscoderConfig.recommended(
        **{
            "d_in": _D,
            "d_sae": _WIDTHS[-1],
            "k": _K,
            "matryoshka_widths": list(_WIDTHS[-1:] if variant.name == _PLAIN else _WIDTHS),
            "hook_name_out": hooks.target.hook_name,
            "input_gain": "norm_weight",
            **variant.fields,
        }
    )
    locate(config.metadata, "transcoder", hooks)
    n_steps = len(activations) // _BATCH
    lr = sm.recommended_runner_fields(config, training_tokens=1, train_batch_size_tokens=1)["lr"]
    attributes = {"n_steps": n_steps, "model": model}
    sae_class = type(variant.sae_class.__name__, (variant.sae_class,), attributes)
    contestant = Contestant(variant.name, "transcoder", config, lr * variant.lr_factor)
    sae = train(contestant, activations, batch_size=_BATCH, seed=seed, sae_class=sae_class)
    result = sm.evaluate(
        inference_model(sae), model, activations.held_out, n_tokens=_N_HELD_OUT, n_ce_tokens=0
    )
    return {prefix.width: prefix.fvu for prefix in result.prefixes}, result.prefixes[-1].dead_fraction


def run(variants: list[Variant], seeds: list[int], show: Callable[[str], None]) -> list[dict[str, Any]]:
    """All variants with all seeds; one record for each pair."""
    model = tiny.load_hooked_transformer()
    activations = collect(
        model,
        _LAYER,
        tiny.text.dataset("train"),
        tiny.text.dataset("held_out"),
        n_tokens=_N_TOKENS,
        n_validation=_N_VALIDATION,
        n_held_out=_N_HELD_OUT,
    )
    records = []
    for seed in seeds:
        for variant in variants:
            fvu, dead = measure(variant, activations, model, seed)
            records.append({"variant": variant.name, "seed": seed, "fvu": fvu, "dead": dead})
            show(f"seed {seed}: {variant.name}: " + ", ".join(f"{w}: {v:.4f}" for w, v in fvu.items()))
    return records


def table(records: list[dict[str, Any]]) -> Table:
    """Ratios to the recommended settings of the same seed: mean, and the range over the seeds."""
    base = {record["seed"]: record["fvu"] for record in records if record["variant"] == _RECOMMENDED}
    shown = Table(title="FVU over that of the recommended settings: mean [range over seeds]")
    shown.add_column("changed")
    for width in _WIDTHS:
        shown.add_column(f"{width:,}", justify="right")
    shown.add_column("dead", justify="right")
    for name in dict.fromkeys(record["variant"] for record in records):
        own = [record for record in records if record["variant"] == name]
        cells = []
        for width in _WIDTHS:
            if width not in own[0]["fvu"]:
                cells.append("")
            elif name == _RECOMMENDED:
                cells.append(f"FVU {statistics.mean(record['fvu'][width] for record in own):.4f}")
            else:
                ratios = [record["fvu"][width] / base[record["seed"]][width] for record in own]
                cells.append(f"{statistics.mean(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")
        shown.add_row(name, *cells, f"{statistics.mean(record['dead'] for record in own):.1%}")
    return shown


def main(argv: list[str] | None = None) -> None:
    """Run, print the table, write recipe.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="variants with this in their name, and the recommended")
    parser.add_argument("--out", type=Path, default=Path("output/benchmarks"))
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    chosen = [variant for variant in VARIANTS if variant.name == _RECOMMENDED or args.only in variant.name]
    console = Console()
    records = run(chosen, args.seeds, lambda line: console.print(line, highlight=False, markup=False))
    console.print(table(records))
    args.out.mkdir(parents=True, exist_ok=True)
    written = {"machine": machine.describe("cpu"), "records": records}
    (args.out / "recipe.json").write_text(json.dumps(written, indent=2) + "\n")
    console.print(f"written: {args.out / 'recipe.json'}")


if __name__ == "__main__":
    main()
