from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, JumpReLUSAE
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka.report import Samples, collector
from saelens_matryoshka.report.samples import Examples
from tests.helpers import transcoder_config
from tests.report.conftest import CONTEXT, D_SAE, collected, random_sae


@pytest.fixture(scope="module")
def dense(sae: JumpReLUSAE, tiny_model: HookedTransformer, prompts: torch.Tensor) -> torch.Tensor:
    """All activations `[prompts, context, d_sae]`, 0 at special tokens: the slow, obvious way."""
    _, cache = tiny_model.run_with_cache(prompts, names_filter="blocks.1.hook_resid_post")
    acts = sae.encode(cache["blocks.1.hook_resid_post"]).detach()
    acts[(prompts == 0) | (prompts == 1) | (prompts == 2)] = 0
    assert 0.02 < (acts > 0).float().mean() < 0.6
    return acts


def test_statistics_are_those_of_all_activations(samples: Samples, dense: torch.Tensor) -> None:
    flat = dense.flatten(0, 1)
    assert samples.n_tokens == dense[..., 0].numel() - 60 - 9
    assert torch.equal(samples.fired, (flat > 0).sum(dim=0))
    torch.testing.assert_close(samples.sums, flat.double().sum(dim=0))
    torch.testing.assert_close(samples.largest, flat.amax(dim=0))
    positive = torch.where(flat > 0, flat, torch.inf).amin(dim=0)
    torch.testing.assert_close(samples.smallest, torch.where(positive.isinf(), 0, positive))
    assert torch.equal(samples.histogram.sum(dim=1), samples.fired)
    assert samples.fired[-1] == 0
    assert samples.top_of(D_SAE - 1) == []
    assert samples.intervals_of(D_SAE - 1) == []


def test_top_examples_are_the_strongest_one_of_a_prompt_with_the_activations_around(
    samples: Samples, dense: torch.Tensor, prompts: torch.Tensor
) -> None:
    for latent in range(D_SAE - 1):
        per_prompt = dense[..., latent].amax(dim=1)
        expected = per_prompt[per_prompt > 0].sort(descending=True).values[:5]
        found = samples.top_of(latent)
        torch.testing.assert_close(torch.tensor([example.value for example in found]), expected)
        assert len({example.prompt for example in found}) == len(found)
        for example in found:
            start = max(example.position - 4, 0)
            stop = min(example.position + 4, CONTEXT)
            assert example.tokens == prompts[example.prompt, start:stop].tolist()
            torch.testing.assert_close(
                torch.tensor(example.activations), dense[example.prompt, start:stop, latent]
            )
            assert example.activations[example.index] == pytest.approx(example.value)


def test_interval_examples_lie_in_their_intervals_which_cover_the_range(
    samples: Samples, dense: torch.Tensor
) -> None:
    for latent in range(D_SAE - 1):
        acts = dense[..., latent]
        intervals = samples.intervals_of(latent)
        assert 4 <= len(intervals) <= 8
        assert intervals[0].high == samples.largest[latent]
        assert intervals[-1].low == 0
        assert sum(interval.share for interval in intervals) == pytest.approx(1)
        for interval in intervals:
            inside = int(((acts >= interval.low) & (acts <= interval.high) & (acts > 0)).sum())
            assert interval.share == pytest.approx(inside / int(samples.fired[latent]), abs=1e-3)
            assert len(interval.examples) == min(2, inside)
            for example in interval.examples:
                assert interval.low <= example.value <= interval.high
                assert acts[example.prompt, example.position] == pytest.approx(example.value)


def test_a_largest_activation_on_an_intervals_end_is_in_the_interval_that_begins_there(
    samples: Samples,
) -> None:
    values = torch.zeros(1, 8)
    values[0, 4] = 4.0
    drawn = Examples(torch.where(values > 0, 30, -1), values, torch.zeros(1, 8, 8))
    found = dataclasses.replace(
        samples,
        fired=torch.tensor([3]),
        largest=torch.tensor([4.0]),
        scale=torch.tensor([8.0]),
        histogram=torch.tensor([[0, 1, 0, 1, 1, 0, 0, 0]]),
        intervals=drawn,
        n_intervals=8,
    )
    strongest, *others = found.intervals_of(0)
    assert (strongest.low, strongest.high, strongest.share) == (4.0, 4.0, pytest.approx(1 / 3))
    assert [example.value for example in strongest.examples] == [4.0]
    assert strongest.share + sum(interval.share for interval in others) == pytest.approx(1)


def test_special_tokens_are_in_contexts_but_never_what_an_example_is_about(
    samples: Samples, sae: JumpReLUSAE, tiny_model: HookedTransformer, prompts: torch.Tensor
) -> None:
    def about(found: Samples) -> set[int]:
        positions = found.top.positions[found.top.positions >= 0]
        return set(prompts.flatten()[positions].tolist())

    assert not about(samples) & {0, 1, 2}
    with_special = collected(sae, tiny_model, prompts, exclude_special_tokens=False)
    assert 2 in about(with_special), "BOS activates many latents most"
    assert with_special.n_tokens == prompts.numel()


def test_samples_do_not_depend_on_how_the_prompts_are_cut(
    samples: Samples,
    sae: JumpReLUSAE,
    tiny_model: HookedTransformer,
    prompts: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collector, "_ACTIVATION_VALUES", 2 * CONTEXT * D_SAE)
    again = collected(sae, tiny_model, prompts, batch_size_prompts=7)
    torch.testing.assert_close(again.top.values, samples.top.values)
    assert torch.equal(again.top.positions, samples.top.positions)
    assert torch.equal(again.histogram, samples.histogram)
    assert torch.equal(again.scale, samples.scale)


def test_a_token_budget_is_kept_to_whole_prompts(
    sae: JumpReLUSAE, tiny_model: HookedTransformer, prompts: torch.Tensor
) -> None:
    seen: list[int] = []
    found = collected(
        sae, tiny_model, prompts, n_tokens=CONTEXT * 9 + 1, batch_size_prompts=4, on_progress=seen.append
    )
    assert found.tokens.shape == (10, CONTEXT)
    assert seen == [4 * CONTEXT, 8 * CONTEXT, 10 * CONTEXT]


def test_a_transcoder_in_training_is_sampled_as_the_model_it_is_saved_as(
    tiny_model: HookedTransformer, prompts: torch.Tensor
) -> None:
    training = sm.MatryoshkaTrainingTranscoder(transcoder_config())
    training.cfg.metadata.hook_name = "blocks.2.ln2.hook_normalized"
    training.topk_threshold.fill_(0.3)
    training.set_input_gain(sm.find_site(tiny_model, 2, "mlp_in").gain)
    before = {name: tensor.clone() for name, tensor in training.state_dict().items()}
    found = collected(training, tiny_model, prompts)
    saved = collected(sm.inference_model(training), tiny_model, prompts)
    assert found.fired.sum() > 0
    assert torch.equal(found.fired, saved.fired)
    assert all(torch.equal(training.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_model_whose_latents_compete_is_sampled_from_its_encode(
    tiny_model: HookedTransformer, prompts: torch.Tensor
) -> None:
    sae = SAE.from_dict({"architecture": "topk", "d_in": 128, "d_sae": D_SAE, "k": 7, "dtype": "float32",
                         "device": "cpu"})  # fmt: skip
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    found = collected(sae, tiny_model, prompts, exclude_special_tokens=False)
    _, cache = tiny_model.run_with_cache(prompts, names_filter=sae.cfg.metadata.hook_name)
    acts = sae.encode(cache[sae.cfg.metadata.hook_name]).to_dense().detach()
    assert torch.equal(found.fired, (acts > 0).flatten(0, 1).sum(dim=0))
    strongest = acts.amax(dim=1).T.sort(dim=1, descending=True).values[:, :5]
    torch.testing.assert_close(found.top.values, strongest)


def test_samples_come_back_from_disk_as_they_were(samples: Samples, tmp_path: Path) -> None:
    samples.save(tmp_path)
    loaded = Samples.load(tmp_path)
    for latent in (0, 40, D_SAE - 1):
        assert loaded.top_of(latent) == samples.top_of(latent)
        assert loaded.intervals_of(latent) == samples.intervals_of(latent)
    assert torch.equal(loaded.density, samples.density)
    (tmp_path / "samples.safetensors").write_bytes(b"no samples")
    with pytest.raises(ValueError, match="no samples that can be read"):
        Samples.load(tmp_path)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"n_tokens": 0}, "n_tokens=0"),
    ({"n_top": 0}, "n_top=0"),
    ({"n_intervals": 5}, "n_intervals=5 must be a power of two"),
    ({"before": -1}, "before=-1"),
    ({"exclude_special_tokens": list(range(4096))}, "all its tokens are special"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_settings_are_named(
    settings: dict[str, Any],
    message: str,
    sae: JumpReLUSAE,
    tiny_model: HookedTransformer,
    prompts: torch.Tensor,
) -> None:
    with pytest.raises(ValueError, match=message):
        collected(sae, tiny_model, prompts[:2], **settings)


def test_a_model_with_other_norms_is_refused(tiny_model: HookedTransformer, prompts: torch.Tensor) -> None:
    sae = random_sae(hook="blocks.1.ln2.hook_normalized")
    sae.cfg.metadata.input_frame = "normalized_folded"
    with pytest.raises(ValueError, match="input_frame"):
        collected(sae, tiny_model, prompts)
