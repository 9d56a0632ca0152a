"""Pages of made-up runs, of any size and with tokens as hostile as can be."""

from __future__ import annotations

import torch

from saelens_matryoshka.report.decoder import DecoderRelations
from saelens_matryoshka.report.logits import LogitEffects
from saelens_matryoshka.report.page import PageContent
from saelens_matryoshka.report.samples import Examples, Samples
from saelens_matryoshka.report.text import TokenText

HOSTILE = [
    b"</script><script>window.hacked=1</script>",
    b"<img src=x onerror='window.hacked=1'>",
    b"<!--<script>",
    b"]]>&amp;&lt;\"'`${window.hacked=1}\\",
    "\u202eright to left\u202c".encode(),
    "שלום مرحبا".encode(),
    "🙂".encode(),
    b"\xf0\x9f",
    b"\x99\x82",
    b"\xff",
    b"\x00\x07\x1b[31m\x7f",
    "\u2028\u200b\ufeff".encode(),
    b"\n\n\t  ",
    b"__proto__",
    b"constructor",
    b"",
]


class MadeUpText(TokenText):
    """Hostile tokens first, then plain ones of four letters."""

    def __init__(self) -> None:
        super().__init__(None)

    def bytes_of(self, token: int) -> bytes:
        if token < len(HOSTILE):
            return HOSTILE[token]
        letters = [(token * 31 + i * i * 7) % 26 for i in range(4)]
        return (" " + "".join(chr(97 + letter) for letter in letters)).encode()


def made_up_page(widths: list[int], *, n_tokens: int = 4_096, vocabulary: int = 500) -> PageContent:
    """A page with all sections; the latents' numbers are random, every 50th latent is dead."""
    generator = torch.Generator().manual_seed(0)
    d_sae, context, before = widths[-1], 64, 8

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    def examples(values: torch.Tensor) -> Examples:
        n = values.shape[1]
        windows = random(d_sae, n, 2 * before + 1) * (random(d_sae, n, 2 * before + 1) < 0.2) * 5
        windows[:, :, before] = values
        positions = integers(n_tokens, d_sae, n)
        positions[dead] = -1
        positions[values > 5] = -1
        return Examples(positions, values, windows)

    dead = torch.arange(d_sae) % 50 == 49
    fired = (n_tokens * 10 ** (-3 * random(d_sae))).long().clamp(min=1).masked_fill(dead, 0)
    samples = Samples(
        tokens=integers(vocabulary, n_tokens // context, context).int(),
        n_tokens=n_tokens,
        fired=fired,
        sums=fired * 1.5,
        largest=torch.full((d_sae,), 5.0).masked_fill(dead, 0),
        smallest=torch.full((d_sae,), 0.5).masked_fill(dead, 0),
        scale=torch.full((d_sae,), 8.0).masked_fill(dead, 0),
        histogram=integers(90, d_sae, 64).masked_fill(dead[:, None], 0),
        top=examples(5 * random(d_sae, 4).sort(dim=1, descending=True).values),
        intervals=examples(torch.arange(8) + random(d_sae, 8)),  # the span is 8, the largest 5
        n_intervals=8,
        before=before,
        after=before,
        about={"text": "made-up text"},
    )
    level = torch.bucketize(torch.arange(d_sae), torch.tensor(widths), right=True)
    below = torch.tensor([0, *widths])[level]
    parent = torch.where(level > 0, (random(d_sae) * below.clamp(min=1)).long(), -1)
    n_levels = len(widths)
    relations = DecoderRelations(
        nearest=integers(d_sae, d_sae, 5),
        nearest_cosine=random(d_sae, 5),
        parent=parent,
        parent_cosine=random(d_sae),
        mean_cosine=random(n_levels, n_levels).tril(),
        parents_in=random(n_levels, n_levels).tril(-1),
    )
    logits = LogitEffects(
        top_tokens=integers(vocabulary, d_sae, 6),
        top_values=random(d_sae, 6),
        bottom_tokens=integers(vocabulary, d_sae, 6),
        bottom_values=-random(d_sae, 6),
        low=torch.zeros(d_sae),
        high=torch.ones(d_sae),
        histogram=torch.zeros(d_sae, 50, dtype=torch.long),
    )
    steps = [1024.0 * (i + 1) for i in range(40)]
    return PageContent(
        title='made up <b>& "quoted"</b></title><script>window.hacked=1</script>',
        kind="Matryoshka SAE of <i>nothing</i>",
        source="blocks.0.hook_resid_post",
        target="blocks.0.hook_resid_post",
        widths=widths,
        relations=relations,
        evaluation=_evaluation(widths),
        log={
            "tokens": steps,
            "loss": [100 / (i + 1) for i in range(40)],
            "fvu": [1 / (i + 1) for i in range(40)],
            "l0": [8.0] * 40,
            "dead": [None, *(i / 100 for i in range(39))],
            "threshold": [0.5] * 40,
            "lr": [3e-4] * 40,
            "fvu_per_prefix": {str(width): [1 / (i + 1) for i in range(40)] for width in widths},
        },
        samples=samples,
        text=MadeUpText(),
        logits=logits,
        k=8,
        facts={"training text": "<script>window.hacked=1</script>"},
    )


def _evaluation(widths: list[int]) -> dict:
    rows = [
        {
            "width": width,
            "fvu": 0.5 / (i + 1),
            "l0": 4.0 * (i + 1),
            "dead_fraction": 0.02,
            "cosine": 0.9,
            "ce_recovered": 0.5 + 0.1 * i,
            "ce_recovered_mean": None,
            "kl": 0.1,
        }
        for i, width in enumerate(widths)
    ]
    ce = {"ce_clean": 3.0, "ce_zero": 4.0, "ce_mean": 3.9}
    return {"prefixes": rows, "n_tokens": 1000, "n_ce_tokens": 500, **ce}
