"""A JSON file per latent, in the layout of the matryoshka_transcoder research code and its sample viewer.

    feature_00042_samples.json   {"statistics": {...}, "top_samples": [{...}, ...]}
    collection_summary.json      counts over all latents

`tokens` and `text` are the token at `position` and the one before it; `mean`, `std` and `min_activation` are
those of the stored samples, `activation_count` and `all_time_max` of all tokens, as there.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from saelens_matryoshka.files.valid_json import dumps
from saelens_matryoshka.report.samples import Example, Samples
from saelens_matryoshka.report.text import TokenText


def write_seed_files(samples: Samples, text: TokenText, folder: Path) -> None:
    """Write a file for each latent that fired, and the summary.

    Args:
        samples: Of all latents.
        text: Of the tokens.
        folder: An empty folder.
    """
    stats: dict[int, dict[str, Any]] = {}
    for latent in samples.fired.nonzero().squeeze(1).tolist():
        examples = samples.top_of(latent)
        stats[latent] = _statistics(samples, latent, examples)
        written = {
            "statistics": stats[latent],
            "top_samples": [_sample(latent, example, text) for example in examples],
        }
        path = folder / f"feature_{latent:05d}_samples.json"
        path.write_text(dumps(written, indent=2, ensure_ascii=False), encoding="utf-8")
    stored = sum(row["num_samples"] for row in stats.values())
    strongest = sorted(stats, key=lambda latent: stats[latent]["all_time_max"], reverse=True)
    summary = {
        "total_samples_seen": int(samples.fired.sum()),
        "total_samples_stored": stored,
        "num_features_tracked": len(stats),
        "avg_samples_per_feature": stored / max(1, len(stats)),
        "features_with_samples": list(stats),
        "top_features_by_activation": [
            {key: stats[latent][key] for key in ("feature_idx", "max_activation", "num_samples")}
            for latent in strongest[:50]
        ],
        # what its viewer lists
        "feature_stats": {
            str(latent): {"sample_count": row["num_samples"], "max_activation": row["max_activation"]}
            for latent, row in stats.items()
        },
    }
    (folder / "collection_summary.json").write_text(dumps(summary, indent=2), encoding="utf-8")


def _statistics(samples: Samples, latent: int, examples: list[Example]) -> dict[str, Any]:
    values = [example.value for example in examples]
    return {
        "feature_idx": latent,
        "num_samples": len(values),
        "max_activation": max(values),
        "mean_activation": statistics.fmean(values),
        "std_activation": statistics.pstdev(values),
        "min_activation": min(values),
        "activation_count": int(samples.fired[latent]),
        "all_time_max": samples.largest[latent].item(),
    }


def _sample(latent: int, example: Example, text: TokenText) -> dict[str, Any]:
    tokens = example.tokens[max(example.index - 1, 0) : example.index + 1]
    return {
        "feature_idx": latent,
        "activation_value": example.value,
        "tokens": tokens,
        "text": text.text_of(tokens),
        "position": example.position,
        "context_tokens": example.tokens,
        "context_text": text.text_of(example.tokens),
    }
