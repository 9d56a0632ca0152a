"""The page of a run: one HTML file that holds everything it shows, and asks for nothing.

Data are embedded as JSON in which no markup can begin, and as base64; the script puts text into the page as
text, never as HTML.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import torch
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from saelens_matryoshka import __version__
from saelens_matryoshka.files.atomic import write_atomically
from saelens_matryoshka.report.decoder import DecoderRelations
from saelens_matryoshka.report.logits import LogitEffects
from saelens_matryoshka.report.packing import pack_latents
from saelens_matryoshka.report.samples import Samples
from saelens_matryoshka.report.text import TokenText
from saelens_matryoshka.runs.fields import short_number
from saelens_matryoshka.widths import latent_levels

_SCRIPTS = ("charts.js", "data.js", "latents.js", "page.js")
_PER_DECADE = 4


@dataclass
class PageContent:
    """What a page shows. What is None is left out, with a sentence that says so."""

    title: str
    """name of the run"""
    kind: str
    """what it is, in a few words"""
    source: str
    """hook it reads"""
    target: str
    """hook it predicts"""
    widths: list[int]
    """cumulative"""
    relations: DecoderRelations
    """between the decoder's rows"""
    evaluation: dict[str, Any] | None = None
    """`EvalResult.to_dict()`"""
    log: dict[str, Any] | None = None
    """`read_log`"""
    samples: Samples | None = None
    """of all latents"""
    text: TokenText | None = None
    """of their tokens"""
    logits: LogitEffects | None = None
    """top and bottom logits"""
    no_logits: str = ""
    """why there are none"""
    k: float | None = None
    """active latents per token in training"""
    facts: dict[str, str] = field(default_factory=dict)
    """shown at the end, and the first tiles"""
    folder: str = "RUN"
    """as the commands that add what is missing would name it"""


def write_page(content: PageContent, path: Path) -> int:
    """Write a page, whole or not at all.

    Returns:
        Its size in bytes.
    """
    # A name in bytes that are no text, such as one in UTF-8 where the locale is C, is shown as far as it is.
    page = render_page(content).encode(errors="replace")
    write_atomically(path, page)
    return len(page)


def render_page(content: PageContent) -> str:
    """The page as HTML."""
    assets = files("saelens_matryoshka.report") / "assets"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((assets / "page.html.j2").read_text(encoding="utf-8"))
    data, blob = _data(content)
    samples = content.samples
    return template.render(
        title=content.title,
        kind=content.kind,
        source=content.source,
        target=content.target,
        version=__version__,
        tiles=_tiles(content),
        rows=_rows(content.evaluation),
        measured=_measured(content.evaluation),
        has_log=content.log is not None,
        has_samples=samples is not None,
        n_levels=len(content.widths),
        no_metrics=f"Not evaluated yet. saelens-matryoshka eval {shlex.quote(content.folder)} --json "
        f"{shlex.quote(f'{content.folder}/metrics.json')}, and this command again, add it.",
        no_log="No metrics.jsonl in the run's folder, so there are no curves.",
        no_samples="No samples were collected. saelens-matryoshka report without --no-samples adds them.",
        density_lead="" if samples is None else _density_lead(samples),
        latents_lead="" if samples is None else _latents_lead(samples),
        facts=content.facts,
        data=htmlsafe_json_dumps(data, separators=(",", ":"), allow_nan=False),
        blob=Markup(blob),
        css=Markup((assets / "page.css").read_text(encoding="utf-8")),
        js=Markup("\n".join((assets / name).read_text(encoding="utf-8") for name in _SCRIPTS)),
    )


def _data(content: PageContent) -> tuple[dict[str, Any], str]:
    relations = content.relations
    data: dict[str, Any] = {
        "widths": content.widths,
        "k": content.k,
        "prefixes": _chart_rows(content.evaluation),
        "log": content.log,
        "relations": {
            "parents_in": relations.parents_in.tolist(),
            "mean_cosine": relations.mean_cosine.tolist(),
        },
        "density": None,
        "latents": None,
    }
    if content.samples is None:
        return data, ""
    assert content.text is not None
    data["density"] = _density(content.samples, content.widths)
    data["latents"], blob = pack_latents(
        content.samples,
        content.text,
        content.widths,
        relations,
        content.logits,
        no_logits=content.no_logits,
    )
    return data, blob


def _chart_rows(evaluation: dict[str, Any] | None) -> list[dict[str, Any]] | None:
    if evaluation is None:
        return None
    names = ("width", "fvu", "l0", "ce_recovered")
    return [{name: row.get(name) for name in names} for row in evaluation["prefixes"]]


def _density(samples: Samples, widths: list[int]) -> dict[str, Any]:
    """Live latents of each level by the log10 of the share of tokens they fire on, and the dead ones."""
    lowest = min(-1, -int(torch.tensor(float(samples.n_tokens)).log10().ceil()))
    edges = torch.arange(lowest * _PER_DECADE, 1, dtype=torch.float64) / _PER_DECADE
    level, counts, dead = latent_levels(widths), [], []
    for index in range(len(widths)):
        density = samples.density[level == index]
        live = density[density > 0].log10().clamp(min=edges[0].item())
        counts.append(torch.histogram(live, edges).hist.long().tolist())
        dead.append(int((density == 0).sum()))
    filled = torch.tensor(counts).sum(dim=0).nonzero().squeeze(1)
    first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, len(edges) - 1)
    return {
        "edges": edges[first : last + 1].tolist(),
        "counts": [row[first:last] for row in counts],
        "dead": dead,
    }


def _tiles(content: PageContent) -> list[tuple[str, str, str]]:
    """Names, figures and notes of the tiles at the top."""
    tiles: list[tuple[str, str, str]] = []
    evaluation, samples = content.evaluation, content.samples
    n_levels = len(content.widths)
    l0, dead, n_tokens = None, None, None
    if evaluation is not None:
        whole = evaluation["prefixes"][-1]
        l0, dead, n_tokens = whole["l0"], whole["dead_fraction"], evaluation.get("n_tokens")
        tiles.append(("FVU", _figure(whole["fvu"], ".3f"), "of the whole dictionary"))
        if whole.get("ce_recovered") is not None:
            tiles.append(("CE recovered", f"{whole['ce_recovered']:.1%}", "against zero ablation"))
    elif samples is not None:
        n_tokens = samples.n_tokens
        l0, dead = samples.fired.sum().item() / n_tokens, (samples.fired == 0).double().mean().item()
    if evaluation is not None or samples is not None:
        note = f"k = {content.k:g} in training" if content.k else "active latents per token"
        tiles.append(("L0", _figure(l0, ".1f"), note))
        tiles.append(("dead", _figure(dead, ".1%"), "" if n_tokens is None else f"on {n_tokens:,} tokens"))
    note = f"in {n_levels} nested levels" if n_levels > 1 else "in one level"
    tiles.append(("latents", f"{content.widths[-1]:,}", note))
    if content.log is not None:
        tiles.append(("trained on", short_number(content.log["tokens"][-1]), "tokens"))
    return tiles


def _figure(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _rows(evaluation: dict[str, Any] | None) -> list[dict[str, str]]:
    return [
        {
            "width": f"{row['width']:,}",
            "fvu": _figure(row["fvu"], ".3f"),
            "l0": _figure(row["l0"], ".1f"),
            "dead": _figure(row["dead_fraction"], ".1%"),
            "cosine": _figure(row.get("cosine"), ".3f"),
            "ce_zero": _figure(row.get("ce_recovered"), ".1%"),
            "ce_mean": _figure(row.get("ce_recovered_mean"), ".1%"),
            "kl": _figure(row.get("kl"), ".3f"),
        }
        for row in (evaluation or {"prefixes": []})["prefixes"]
    ]


def _measured(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None or evaluation.get("n_tokens") is None:
        return ""
    said = f"The inference model on {evaluation['n_tokens']:,} tokens"
    if evaluation.get("n_ce_tokens") and evaluation.get("ce_clean") is not None:
        clean, zero, mean = (
            _figure(evaluation.get(name), ".3f") for name in ("ce_clean", "ce_zero", "ce_mean")
        )
        said += (
            f"; cross-entropy on {evaluation['n_ce_tokens']:,} of them: {clean} nats untouched, {zero} with "
            f"the target zero-ablated, {mean} mean-ablated"
        )
    return said + "."


def _density_lead(samples: Samples) -> str:
    special = samples.about.get("settings", {}).get("exclude_special_tokens")
    which = {True: ", special tokens left out", False: ", special tokens among them"}.get(special, "")
    return (
        f"On {samples.n_tokens:,} tokens{which}. A level holds the latents that its prefix adds to the one "
        "before."
    )


def _latents_lead(samples: Samples) -> str:
    return (
        f"Where each latent fires on {samples.n_tokens:,} tokens of {samples.about.get('text', 'text')}. The "
        "stronger a token's colour, the nearer to the latent's largest activation; the token a context was "
        "chosen for is underlined. Beside each latent: the logits its decoder direction raises most."
    )
