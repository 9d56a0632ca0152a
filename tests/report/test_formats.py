"""The files other tools read, read the way those tools read them."""

from __future__ import annotations

import contextlib
import gzip
import json
import struct
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUSAE
from transformer_lens import HookedTransformer

from saelens_matryoshka.report import Samples, feature_files
from saelens_matryoshka.report.feature_files import read_feature, write_feature_files
from saelens_matryoshka.report.logits import LogitEffects, logit_effects
from saelens_matryoshka.report.neuronpedia import write_neuronpedia
from saelens_matryoshka.report.seed_files import write_seed_files
from saelens_matryoshka.report.text import TokenText
from tests.report.conftest import D_SAE


@pytest.fixture(scope="module")
def text(tiny_model: HookedTransformer) -> TokenText:
    return TokenText(tiny_model.tokenizer)


@pytest.fixture(scope="module")
def logits(sae: JumpReLUSAE, tiny_model: HookedTransformer) -> LogitEffects:
    return logit_effects(sae, tiny_model)


# the class that the research code makes of each entry, which takes these fields and no other
ActivationSample = make_dataclass(
    "ActivationSample",
    ["feature_idx", "activation_value", "tokens", "text", "position", "context_tokens", "context_text"],
)


def test_json_per_latent_has_the_research_codes_layout(
    samples: Samples, text: TokenText, tmp_path: Path
) -> None:
    write_seed_files(samples, text, tmp_path)
    files = sorted(tmp_path.glob("feature_*_samples.json"))
    live = samples.fired.nonzero().squeeze(1).tolist()
    assert [path.name for path in files] == [f"feature_{latent:05d}_samples.json" for latent in live]
    for latent, path in zip(live, files, strict=True):
        written = json.loads(path.read_text())
        stats = written["statistics"]
        assert stats["feature_idx"] == latent
        assert stats["activation_count"] == int(samples.fired[latent])
        assert stats["all_time_max"] == pytest.approx(samples.largest[latent].item())
        found = [ActivationSample(**entry) for entry in written["top_samples"]]
        values = torch.tensor([sample.activation_value for sample in found])
        assert stats["num_samples"] == len(found)
        assert stats["max_activation"] == pytest.approx(values.max().item())
        assert stats["mean_activation"] == pytest.approx(values.mean().item())
        assert stats["std_activation"] == pytest.approx(values.std(correction=0).item(), abs=1e-5)
        for sample, example in zip(found, samples.top_of(latent), strict=True):
            assert sample.tokens[-1] == samples.tokens[example.prompt, example.position]
            assert sample.context_text == text.text_of(sample.context_tokens)
    summary = json.loads((tmp_path / "collection_summary.json").read_text())
    assert summary["features_with_samples"] == live
    assert summary["total_samples_seen"] == int(samples.fired.sum())
    best = summary["top_features_by_activation"][0]["feature_idx"]
    assert samples.largest[best] == samples.largest.max()
    assert summary["feature_stats"][str(best)]["sample_count"] == len(samples.top_of(best))


def _batches(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("batch-*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))
    return [json.loads(path.read_text()) for path in paths]


def test_neuronpedia_batches_hold_every_latent_with_its_groups(
    samples: Samples, text: TokenText, sae: JumpReLUSAE, logits: LogitEffects, tmp_path: Path
) -> None:
    write_neuronpedia(samples, text, tmp_path, sae=sae, logits=logits, sae_set="res", layer=1)
    features = [feature for batch in _batches(tmp_path) for feature in batch["features"]]
    assert [feature["feature_index"] for feature in features] == list(range(D_SAE))
    for latent, feature in enumerate(features):
        assert feature["frac_nonzero"] == pytest.approx(samples.density[latent].item())
        assert sum(feature["freq_hist_data_bar_heights"]) == int(samples.fired[latent])
        assert sum(feature["logits_hist_data_bar_heights"]) == 4096
        assert feature["pos_str"] == [text.string_of(t) for t in logits.top_tokens[latent].tolist()]
        groups = [a for a in feature["activations"] if a["bin_contains"] == -1]
        assert len(groups) == len(samples.top_of(latent))
        for activation in feature["activations"]:
            peak = activation["values"][activation["qualifying_token_index"]]
            assert len(activation["tokens"]) == len(activation["values"])
            assert activation["bin_min"] - 1e-3 <= peak <= activation["bin_max"] + 1e-3
        shares = {a["bin_min"]: a["bin_contains"] for a in feature["activations"] if a["bin_min"] >= 0}
        assert sum(shares.values()) <= 1 + 1e-4
    assert features[-1]["activations"] == []
    skipped = json.loads((tmp_path / "skipped_indexes.json").read_text())
    assert skipped["skipped_indexes"] == []
    assert skipped["layer"] == "1"


def test_sae_dashboards_own_classes_read_the_batches(
    samples: Samples, text: TokenText, sae: JumpReLUSAE, logits: LogitEffects, tmp_path: Path
) -> None:
    dashboard = pytest.importorskip(
        "sae_dashboard.neuronpedia.neuronpedia_dashboard",
        reason="pip install --no-deps sae-dashboard, whose pins contradict ours",
    )
    write_neuronpedia(samples, text, tmp_path, sae=sae, logits=logits, sae_set="res", layer=1)
    for batch in _batches(tmp_path):
        assert dashboard.NeuronpediaDashboardBatch(**batch).to_dict() == batch


def test_feature_files_are_found_by_the_viewers_byte_ranges(
    samples: Samples, text: TokenText, logits: LogitEffects, tmp_path: Path
) -> None:
    write_feature_files(samples, text, tmp_path, layer=1, transcoder_id="ours", logits=logits)
    index = json.loads(gzip.decompress((tmp_path / "index.json.gz").read_bytes()))
    offsets = index["1"]["offsets"]
    assert len(offsets) == D_SAE + 1
    data = (tmp_path / index["1"]["filename"]).read_bytes()
    assert offsets[-1] == len(data)
    for latent in range(D_SAE):
        part = data[offsets[latent] : offsets[latent + 1] + 1]  # an HTTP range ends inclusively
        (length,) = struct.unpack("<I", part[:4])
        feature = json.loads(zlib.decompress(part[4 : 4 + length]))
        assert feature == read_feature(tmp_path, 1, latent)
        assert feature["index"] == latent
        assert feature["activation_frequency"] == pytest.approx(samples.density[latent].item())
        assert sum(feature["histogram"]) == int(samples.fired[latent])
        if not feature["histogram"]:
            continue
        assert feature["act_max"] >= samples.largest[latent]
        assert len(feature["quantile_values"]) == 100
        assert feature["quantile_values"] == sorted(feature["quantile_values"])
        assert feature["quantile_values"][-1] == pytest.approx(feature["act_max"])
        for group in feature["examples_quantiles"]:
            for example in group["examples"]:
                assert len(example["tokens"]) == len(example["tokens_acts_list"])
                assert example["tokens_acts_list"][example["train_token_ind"]] > 0
        contexts = [tuple(e["tokens"]) for g in feature["examples_quantiles"] for e in g["examples"]]
        repeated = [e["is_repeated_datapoint"] for g in feature["examples_quantiles"] for e in g["examples"]]
        assert len(contexts) - sum(repeated) == len(set(contexts))


def test_percentiles_are_those_of_the_activations(
    samples: Samples,
    text: TokenText,
    sae: JumpReLUSAE,
    tiny_model: HookedTransformer,
    prompts: torch.Tensor,
    tmp_path: Path,
) -> None:
    write_feature_files(samples, text, tmp_path, layer=1, transcoder_id="ours", logits=None)
    _, cache = tiny_model.run_with_cache(prompts, names_filter="blocks.1.hook_resid_post")
    acts = sae.encode(cache["blocks.1.hook_resid_post"]).detach()[prompts > 2]
    latent = int(samples.fired.argmax())
    values = acts[:, latent][acts[:, latent] > 0].double()
    found = torch.tensor(read_feature(tmp_path, 1, latent)["quantile_values"], dtype=torch.float64)
    expected = values.quantile(torch.arange(1, 101, dtype=torch.float64) / 100)
    assert (found - expected).abs().max() < 2 * samples.scale[latent] / 64  # bins


def test_layers_are_added_to_one_index_and_never_replaced(
    samples: Samples, text: TokenText, tmp_path: Path
) -> None:
    for layer in (3, 0):
        write_feature_files(samples, text, tmp_path, layer=layer, transcoder_id="ours", logits=None)
    assert read_feature(tmp_path, 3, 5) == read_feature(tmp_path, 0, 5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="has feature files of layer 3"):
        write_feature_files(samples, text, tmp_path, layer=3, transcoder_id="other", logits=None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "index.json.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="no index of feature files that can be read"):
        write_feature_files(samples, text, tmp_path, layer=7, transcoder_id="ours", logits=None)


def test_layers_that_are_added_at_once_are_all_in_the_index(
    samples: Samples, text: TokenText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both writers have read the index before either writes it, unless one waits for the other."""
    read_index, both = feature_files._read_index, threading.Barrier(2)
    reads: Counter[int] = Counter()

    def slow(folder: Path) -> dict[str, Any]:
        found = read_index(folder)
        reads[threading.get_ident()] += 1
        if reads[threading.get_ident()] > 1:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(timeout=0.5)
        return found

    def write(layer: int) -> None:
        write_feature_files(samples, text, tmp_path, layer=layer, transcoder_id="ours", logits=None)

    monkeypatch.setattr(feature_files, "_read_index", slow)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (0, 1)))
    assert sorted(read_index(tmp_path)) == ["0", "1"]
