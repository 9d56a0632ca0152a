"""Draws the guides' pictures, docs/img/*.svg: `python docs/pictures.py output/comparison.json`.

The comparison is that of `examples/evaluate_and_compare.py`: the figures in nested.svg are read from it.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

OUT = Path(__file__).parent / "img"
LEVELS = ("#0f766e", "#14b8a6", "#7dd3c8", "#cdeee9")
INK, SOFT, LINE, ACCENT, PAPER = "#1f2933", "#5f6c7b", "#cbd2d9", "#d9480f", "#ffffff"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
SANS = "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif"


class Drawing:
    """An SVG on a sheet of white paper, so that it reads on a dark page too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'font-family="{SANS}" font-size="14" fill="{INK}">',
            f"<title>{escape(title)}</title>",
            f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{SOFT}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="10" fill="{PAPER}"/>',
        ]

    def rect(
        self, x: float, y: float, w: float, h: float, fill: str, *, stroke: str = "none", rx: int = 4
    ) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{rx}" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        anchor: str = "start",
        size: int = 14,
        fill: str = INK,
        mono: bool = False,
        bold: bool = False,
    ) -> None:
        family = f' font-family="{MONO}"' if mono else ""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{fill}"{family}{weight}>'
            f"{escape(words)}</text>"
        )

    def path(
        self, d: str, *, stroke: str = SOFT, width: float = 1.5, tip: bool = False, dash: str = ""
    ) -> None:
        end = ' marker-end="url(#tip)"' if tip else ""
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<path d="{d}" fill="none" stroke="{stroke}" stroke-width="{width}"{dashes}{end}/>'
        )

    def dot(self, x: float, y: float, fill: str, r: float = 6) -> None:
        self.parts.append(
            f'<circle cx="{x}" cy="{y}" r="{r}" fill="{fill}" stroke="{PAPER}" stroke-width="2"/>'
        )

    def save(self, name: str) -> None:
        OUT.mkdir(exist_ok=True)
        (OUT / name).write_text("\n".join([*self.parts, "</svg>", ""]))


def nested(comparison: Path) -> None:
    """One dictionary, its prefixes, and how well each predicts, beside a plain dictionary cut there."""
    models = json.loads(comparison.read_text())
    picture = Drawing(800, 336, "A nested dictionary: every prefix predicts the target on its own")
    left, ends = 30, [102, 206, 342, 486]
    picture.text(left, 36, "one dictionary, its latents in order", fill=SOFT)
    picture.text(625, 36, "variance missed (FVU) by", anchor="middle", size=12, fill=SOFT)
    picture.text(560, 74, "nested", anchor="middle", bold=True)
    picture.text(690, 74, "plain, cut there", anchor="middle", fill=SOFT)
    for x in range(left, ends[-1] - 5, 8):
        level = sum(x + 6 > end for end in ends)
        picture.rect(x, 50, 6, 34, LEVELS[level], rx=1)
    rows = zip(ends, models["nested"]["prefixes"], models["plain"]["prefixes"], strict=True)
    for level, (end, row, plain) in enumerate(rows):
        y = 108 + 42 * level
        picture.rect(left, y, end - left - 2, 28, LEVELS[level])
        label = f"{row['width']:,} latents" if level else f"{row['width']}"
        colour = PAPER if level < 2 else INK
        picture.text((left + end) / 2, y + 19, label, anchor="middle", size=12, fill=colour, bold=True)
        picture.path(f"M{end + 4} {y + 14} H518", tip=True)
        picture.text(560, y + 20, f"{row['fvu']:.0%}", anchor="middle", size=18, bold=True)
        picture.text(690, y + 20, f"{plain['fvu']:.0%}", anchor="middle", size=18, fill=SOFT)
    for line, words in enumerate(
        (
            "The loss adds up the errors of all prefixes: the first latents learn what matters most,",
            "the later ones refine it. A plain dictionary is a little better whole, and of no use cut.",
        )
    ):
        picture.text(left, 300 + 18 * line, words, fill=SOFT, size=13)
    picture.save("nested.svg")


def frames() -> None:
    """Which tensor is "the MLP's input"."""
    picture = Drawing(800, 390, "Three tensors are called the MLP's input")
    y, down = 120, 210
    picture.path(f"M30 {y} H772", stroke=LINE, width=6)
    picture.text(772, y - 14, "residual stream", anchor="end", fill=SOFT)
    picture.path(f"M90 {y} V{down} H138", tip=True)
    boxes = ((140, 70, "÷ RMS"), (300, 90, "× w (+ b)"), (474, 66, "MLP"), (586, 66, "norm"))
    for x, w, words in boxes:
        picture.rect(x, down - 22, w, 44, "#eef4f7", stroke=LINE)
        picture.text(x + w / 2, down + 5, words, anchor="middle")
    for (x, w, _), (following, _, _) in pairwise(boxes):
        picture.path(f"M{x + w} {down} H{following - 2}", tip=True)
    picture.path(f"M652 {down} H758 V{y + 8}", tip=True)
    picture.text(619, down + 40, "Gemma 2 and 3", anchor="middle", size=11, fill=SOFT)
    for x, top, lift, name, note in (
        (90, y, 30, "hook_resid_mid", "before the norm"),
        (255, down, 46, "ln2.hook_normalized", "before the gain"),
        (432, down, 46, "mlp.hook_in", "what the MLP reads"),
        (704, down, 46, "hook_mlp_out", "what it adds"),
    ):
        picture.dot(x, top, ACCENT)
        picture.text(x, top - lift, name, anchor="middle", mono=True, size=12, bold=True)
        picture.text(x, top - lift + 14, note, anchor="middle", size=11, fill=SOFT)
    picture.path(f"M432 {down + 12} V280", dash="4 4", stroke=LEVELS[0])
    picture.path(f"M698 280 V{down + 14}", dash="4 4", stroke=LEVELS[0], tip=True)
    picture.rect(414, 280, 302, 38, LEVELS[0])
    picture.text(565, 304, "a transcoder, as it is trained", anchor="middle", fill=PAPER, bold=True)
    picture.path(f"M255 {down + 12} V349 H410", dash="4 4", stroke=LEVELS[1], tip=True)
    picture.path(f"M716 349 H736 V{down + 20} L712 {down + 6}", dash="4 4", stroke=LEVELS[1], tip=True)
    picture.rect(414, 330, 302, 38, LEVELS[1])
    picture.text(565, 354, "as it is saved, with w and b folded in", anchor="middle", fill=PAPER, bold=True)
    picture.text(30, 40, "Three tensors are called “the MLP's input”", size=17, bold=True)
    picture.save("frames.svg")


def selection() -> None:
    """BatchTopK in training, a threshold at inference."""
    scores = [
        [2.9, 0.4, 1.8, 0.0, 2.2, 0.7, 0.0, 1.5],
        [0.3, 0.9, 0.0, 0.6, 0.0, 1.6, 0.2, 0.0],
        [1.7, 0.0, 0.5, 2.4, 0.0, 0.8, 1.2, 0.0],
        [0.0, 1.4, 0.6, 0.0, 1.9, 0.0, 0.3, 0.5],
    ]
    k = 2
    picture = Drawing(800, 300, "Selection in training and at inference")
    ranked = sorted((value for row in scores for value in row), reverse=True)
    kept_in_training = ranked[k * len(scores) - 1]
    threshold = 1.55
    panels = (
        (30, "Training: BatchTopK", f"the k·B = {k}·{len(scores)} largest of the batch", kept_in_training),
        (420, "Inference: JumpReLU", f"all above the threshold θ = {threshold}", threshold + 1e-9),
    )
    for left, title, note, least in panels:
        picture.text(left, 36, title, size=17, bold=True)
        picture.text(left, 58, note, fill=SOFT)
        for row, values in enumerate(scores):
            y = 78 + 38 * row
            picture.text(left, y + 20, f"token {row + 1}", size=12, fill=SOFT)
            kept = 0
            for column, value in enumerate(values):
                x = left + 56 + 32 * column
                on = value >= least
                kept += on
                picture.rect(x, y, 29, 29, LEVELS[0] if on else "#eef4f7", rx=3)
                shown, colour = f"{value:.1f}" if value else "0", PAPER if on else SOFT
                picture.text(x + 14.5, y + 19, shown, anchor="middle", size=11, fill=colour)
            picture.text(left + 318, y + 20, f"{kept}", size=13, bold=True)
        picture.text(left + 306, 70, "active", size=11, fill=SOFT)
    picture.text(30, 258, "Which latents a token keeps depends on its batch.", size=13, fill=SOFT)
    picture.text(420, 258, "Each token is judged alone. θ is set so that the mean", size=13, fill=SOFT)
    picture.text(420, 276, "number of active latents is k on the last training batches.", size=13, fill=SOFT)
    picture.text(30, 276, "On average it keeps k, some more, some fewer.", size=13, fill=SOFT)
    picture.save("selection.svg")


if __name__ == "__main__":
    nested(Path(sys.argv[1]))
    frames()
    selection()
