"""What SAEDashboard's Neuronpedia runner writes: batches, `skipped_indexes.json`, `run_settings.json`.

As there, the first group of a latent's activations are its strongest (bin_min -1, bin_contains -1, bin_max
the largest), and the others lie in equal intervals of activation, the highest first. What differs: an example
is a context of some tokens, not its whole prompt; there are half to all of `n_intervals` intervals (their
ends are fractions of a power of two); correlations between latents and with neurons are left empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from saelens_matryoshka.files.valid_json import dumps
from saelens_matryoshka.report.logits import LogitEffects
from saelens_matryoshka.report.samples import Example, Samples
from saelens_matryoshka.report.text import TokenText

_LATENTS_PER_FILE = 128
_ALIGNED_NEURONS = 3


def write_neuronpedia(
    samples: Samples,
    text: TokenText,
    folder: Path,
    *,
    sae: SAE[Any],
    logits: LogitEffects | None,
    sae_set: str,
    layer: int,
) -> None:
    """Write the batches.

    Args:
        samples: Of all latents.
        text: Of the tokens.
        folder: An empty folder.
        sae: What was sampled.
        logits: Its top and bottom logits; None where it writes to something without logits.
        sae_set: Neuronpedia's name for a set of SAEs.
        layer: Its layer.
    """
    metadata = sae.cfg.metadata
    head = {
        "model_id": (metadata.model_name or "").rpartition("/")[2],
        "layer": layer,
        "sae_set": sae_set,
        "sae_id_suffix": None,
    }
    aligned = _aligned_neurons(sae.W_dec)
    for batch, start in enumerate(range(0, samples.d_sae, _LATENTS_PER_FILE)):
        latents = range(start, min(start + _LATENTS_PER_FILE, samples.d_sae))
        features = [_feature(samples, text, latent, logits, aligned[latent], metadata) for latent in latents]
        _write(folder / f"batch-{batch}.json", {**head, "features": features})
    _write(
        folder / "skipped_indexes.json",
        {**head, "layer": str(layer), "log_sparsity": None, "skipped_indexes": []},
    )
    settings = {
        "sae_set": sae_set,
        "huggingface_dataset_path": metadata.dataset_path or "",
        "n_prompts_total": len(samples.tokens),
        "n_tokens_in_prompt": samples.tokens.shape[1],
        "n_features_at_a_time": _LATENTS_PER_FILE,
        "n_quantiles": samples.n_intervals,
        "top_acts_group_size": samples.top.positions.shape[1],
        "quantile_group_size": samples.intervals.positions.shape[1] // samples.n_intervals,
        "model_id": head["model_id"],
        "layer": layer,
    }
    _write(folder / "run_settings.json", settings)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(dumps(value, ensure_ascii=False), encoding="utf-8")


def _aligned_neurons(W_dec: torch.Tensor) -> list[dict[str, list[Any]]]:
    """The dimensions each decoder row is largest in, as they are and as a share of its L1 norm."""
    rows = W_dec.detach().float().cpu()
    best = rows.topk(min(_ALIGNED_NEURONS, rows.shape[1]), dim=1)
    shares = best.values / rows.abs().sum(dim=1, keepdim=True).clamp(min=1e-12)
    return [
        {
            "neuron_alignment_indices": index,
            "neuron_alignment_values": _rounded(value),
            "neuron_alignment_l1": _rounded(share),
        }
        for index, value, share in zip(
            best.indices.tolist(), best.values.tolist(), shares.tolist(), strict=True
        )
    ]


def _feature(
    samples: Samples,
    text: TokenText,
    latent: int,
    logits: LogitEffects | None,
    aligned: dict[str, list[Any]],
    metadata: Any,
) -> dict[str, Any]:
    feature = {
        "feature_index": latent,
        **aligned,
        **{
            f"correlated_{what}_{measure}": []
            for what in ("neurons", "features")
            for measure in ("indices", "l1", "pearson")
        },
        "neg_str": [],
        "neg_values": [],
        "pos_str": [],
        "pos_values": [],
        "frac_nonzero": samples.density[latent].item(),
        "freq_hist_data_bar_values": [],
        "freq_hist_data_bar_heights": [],
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "n_prompts_total": len(samples.tokens),
        "n_tokens_in_prompt": samples.tokens.shape[1],
        "dataset": metadata.dataset_path or "",
        "decoder_weights_dist": [],
        "activations": _activations(samples, text, latent),
        "vector": [],
    }
    counts = samples.histogram[latent]
    if bool(counts.any()):
        filled = counts.nonzero().squeeze(1)
        bins = torch.arange(int(filled[0]), int(filled[-1]) + 1)
        width = samples.scale[latent].item() / len(counts)
        feature["freq_hist_data_bar_values"] = _rounded(((bins + 0.5) * width).tolist(), 5)
        feature["freq_hist_data_bar_heights"] = counts[bins].tolist()
    if logits is not None:
        feature["pos_str"] = [text.string_of(token) for token in logits.top_tokens[latent].tolist()]
        feature["neg_str"] = [text.string_of(token) for token in logits.bottom_tokens[latent].tolist()]
        feature["pos_values"] = _rounded(logits.top_values[latent].tolist())
        feature["neg_values"] = _rounded(logits.bottom_values[latent].tolist())
        n_bins = logits.histogram.shape[1]
        edges = torch.linspace(logits.low[latent].item(), logits.high[latent].item(), n_bins + 1)
        feature["logits_hist_data_bar_values"] = _rounded(((edges[1:] + edges[:-1]) / 2).tolist(), 5)
        feature["logits_hist_data_bar_heights"] = logits.histogram[latent].tolist()
    return feature


def _activations(samples: Samples, text: TokenText, latent: int) -> list[dict[str, Any]]:
    strongest = {"bin_min": -1, "bin_max": samples.largest[latent].item(), "bin_contains": -1}
    found = [_activation(example, strongest, text) for example in samples.top_of(latent)]
    density = samples.density[latent].item()
    for interval in samples.intervals_of(latent):
        # there, a token on which the latent does not fire is in the lowest interval
        silent = 1 - density if interval.low == 0 else 0
        group = {
            "bin_min": interval.low,
            "bin_max": interval.high,
            "bin_contains": round(interval.share * density + silent, 5),
        }
        found += [_activation(example, group, text) for example in interval.examples]
    return found


def _activation(example: Example, group: dict[str, Any], text: TokenText) -> dict[str, Any]:
    return {
        **{name: round(value, 5) for name, value in group.items()},
        "tokens": [text.string_of(token) for token in example.tokens],
        "values": _rounded(example.activations),
        "qualifying_token_index": example.index,
    }


def _rounded(values: list[float], digits: int = 3) -> list[float]:
    return [round(value, digits) for value in values]
