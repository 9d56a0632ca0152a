from __future__ import annotations

import ctypes
import itertools
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from rich.console import Console
from sae_lens import LanguageModelSAERunnerConfig
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from benchmarks.estimate import compare
from saelens_matryoshka.evaluation.activations import hook_activations
from saelens_matryoshka.parallel import Mesh
from saelens_matryoshka.random_state import random_state
from saelens_matryoshka.runner import prepare_trainer
from saelens_matryoshka.runs import language_models
from saelens_matryoshka.runs import memory as memory_module
from saelens_matryoshka.runs.buffer import buffer_rows
from saelens_matryoshka.runs.estimate import estimate
from saelens_matryoshka.runs.language_models import hooked_config, model_shape
from saelens_matryoshka.runs.memory import (
    BACKWARD,
    FILLING,
    FORWARD,
    LOADING,
    PHASES,
    SAVING,
    SHUFFLING,
    by_phase,
    memory_needs,
    trace_forward,
)
from saelens_matryoshka.runs.tracing import PeakMemory
from saelens_matryoshka.store.mixing import MixingBuffer
from saelens_matryoshka.store.reading import hooks_of
from saelens_matryoshka.store.state import StoreState
from saelens_matryoshka.store.token_stream import Position
from tests.helpers import runner_config, trainer_for, transcoder_config

_BESIDE_THE_STEP = (
    memory_module.BUFFER,
    memory_module.WAITING,
    memory_module.PROCESS,
    memory_module.WORKSPACES,
    "its copies at a refill",
    "held-out prompts",
    "recent rows",
    "dictionary",
)
REPOSITORY = Path(__file__).parents[2]


def _gemma(**overrides: Any) -> LanguageModelSAERunnerConfig[Any]:
    sae = sm.MatryoshkaTrainingTranscoderConfig(
        d_in=2304,
        d_sae=18432,
        k=96,
        matryoshka_widths=[1152, 4608, 9216, 18432],
        hook_name_out="blocks.8.hook_mlp_out",
        device=overrides.get("device", "cpu"),
    )
    settings: dict[str, Any] = {
        "model_name": "gemma-2-2b",
        "hook_name": "blocks.8.ln2.hook_normalized",
        "context_size": 128,
        "store_batch_size_prompts": 16,
        "n_batches_in_buffer": 256,
        "training_tokens": 1_000_000,
        "train_batch_size_tokens": 4096,
        "dead_feature_window": 1000,
    }
    return runner_config(sae, **{**settings, **overrides})


# ---- the shapes of language models


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gpt2", (12, 768, 3072, 50257, 163_037_184)),
        ("gpt2-xl", (48, 1600, 6400, 50257, 1_637_792_000)),
        ("pythia-70m-deduped", (6, 512, 2048, 50304, 70_426_624)),
        ("Qwen/Qwen3-0.6B", (28, 1024, 3072, 151936, 751_632_384)),
        ("gemma-2-2b", (26, 2304, 9216, 256000, None)),
        ("meta-llama/Llama-3.2-1B", (16, 2048, 8192, 128256, None)),
    ],
)
def test_shapes_are_known_without_the_hub(name: str, shape: tuple[int | None, ...]) -> None:
    config = hooked_config(name)
    assert (config.n_layers, config.d_model, config.d_mlp, config.d_vocab) == shape[:4]
    if shape[4] is not None:
        model = model_shape(runner_config(transcoder_config(), model_name=name)).build("meta")
        weights = sum(
            p.numel() for key, p in model.named_parameters() if not key.endswith(("b_U", "_b_K", "_b_V"))
        )
        assert weights == pytest.approx(shape[4], rel=0.01)


def test_every_model_of_the_table_can_be_built_and_is_one_that_transformer_lens_knows() -> None:
    for name in language_models._table():
        shape = model_shape(runner_config(transcoder_config(), model_name=name))
        assert shape.build("meta", n_layers=1).cfg.d_model == shape.config.d_model


def test_an_unknown_model_is_refused_with_similar_names() -> None:
    with pytest.raises(ValueError, match=r"model_name='gpt3'.*Similar: .*gpt2"):
        model_shape(runner_config(transcoder_config(), model_name="gpt3"))


def test_a_model_whose_shape_is_not_at_hand_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="its shape is not known here"):
        model_shape(runner_config(transcoder_config(), model_name="facebook/opt-125m"))


# ---- counting


@pytest.mark.parametrize("autocast", [False, True])
def test_tensors_without_data_count_what_the_real_model_takes(
    tiny_model: HookedTransformer, autocast: bool
) -> None:
    cfg = runner_config(
        transcoder_config(), context_size=64, store_batch_size_prompts=4, autocast_lm=autocast
    )
    traced = trace_forward([cfg], model_shape(cfg))
    tokens = torch.zeros(4, 64, dtype=torch.long)
    with PeakMemory() as real, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hook_activations(tiny_model, tokens, hooks_of([cfg]))
    assert traced.peak == pytest.approx(real.peak, rel=0.01)
    weights = {t.untyped_storage().data_ptr(): t for t in tiny_model.state_dict().values()}
    assert traced.weights == pytest.approx(
        sum(t.untyped_storage().nbytes() for t in weights.values()), rel=0.02
    )


@pytest.mark.parametrize("mix", [0.0, 0.5])
@pytest.mark.parametrize(("buffer_size", "llm_batch"), [(1000, 96), (300, 512), (512, 512)])
def test_the_buffer_is_followed_to_the_row(mix: float, buffer_size: int, llm_batch: int) -> None:
    width, train_batch, wanted = 64, 128, 3000

    batches = itertools.count(1)
    source = ((torch.zeros(llm_batch, width), position) for position in batches)
    with PeakMemory() as memory:
        kept = []
        for batch in MixingBuffer(
            source, buffer_size=buffer_size, batch_size=train_batch, mix_fraction=mix, start=0
        ):
            kept = [*kept[-1:], batch]  # as the trainer's last step does
            wanted -= train_batch
            if wanted <= 0:
                break
    rows = buffer_rows(
        buffer_size=buffer_size, llm_batch=llm_batch, train_batch=train_batch, mix=mix, wanted=3000
    )
    most = max(rows.filling + llm_batch, rows.shuffling, rows.serving + train_batch)
    foretold = 4 * width * (most + 2 * train_batch)
    assert foretold == pytest.approx(memory.peak, rel=0.05)
    n_read = (next(batches) - 1) * llm_batch
    assert rows.read == pytest.approx(n_read, abs=max(buffer_size, llm_batch))
    assert rows.first_read == -(-buffer_size // llm_batch) * llm_batch
    collected, mixed = buffer_size > llm_batch, mix > 0
    assert rows.first_moved == rows.first_read * (collected + mixed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["sae", "transcoder", "dead", "dead, few chosen"])
def test_the_step_takes_what_is_foretold(kind: str, dtype: str) -> None:
    d, d_sae, batch = 64, 4096, 1024
    sizes: dict[str, Any] = {
        "d_in": d, "d_sae": d_sae, "k": 8, "matryoshka_widths": [256, 1024, 4096], "dtype": dtype,
    }  # fmt: skip
    if kind == "dead":
        sizes["aux_k"] = 64
    config: Any = sm.MatryoshkaTrainingSAEConfig(**sizes)
    build: Any = sm.MatryoshkaTrainingSAE
    if kind == "transcoder":
        config = sm.MatryoshkaTrainingTranscoderConfig(**sizes, hook_name_out="blocks.2.hook_mlp_out")
        build = sm.MatryoshkaTrainingTranscoder
    sae = build(config)
    width = d if kind != "transcoder" else 2 * d
    batches = [torch.randn(batch, width) for _ in range(2)]
    trainer = trainer_for(sae, batches, dead_feature_window=1000)
    prepare_trainer(trainer)
    if kind.startswith("dead"):
        dead = torch.arange(d_sae) % 10 == 0
        trainer.n_forward_passes_since_fired[dead] = 2000
    with PeakMemory() as memory:
        trainer.step(batches[0])
        if kind.startswith("dead"):
            trainer.n_forward_passes_since_fired[dead] = 2000
        output = trainer.step(batches[1])
    assert output.loss.isfinite()
    cfg = runner_config(
        config,
        train_batch_size_tokens=batch,
        training_tokens=100 * batch,
        dead_feature_window=4 if kind.startswith("dead") else 1000,
        dtype=dtype,
    )
    trace = memory_module.ForwardTrace(weights=0, n_parameters=0, peak=0, widths={})
    parts = [need for need in memory_needs([cfg], trace) if need.what not in _BESIDE_THE_STEP]
    foretold = max(by_phase(parts, "cpu")[phase] for phase in (FORWARD, BACKWARD))
    assert foretold == pytest.approx(memory.peak, rel=0.15)


# ---- the estimate


def test_nothing_is_left_out_and_each_device_has_its_own() -> None:
    found = estimate(
        _gemma(device="cuda", llm_device="cuda:1", act_store_device="cpu"),
        available={"cuda": 80 << 30, "cpu": 64 << 30},
        with_time=False,
    )
    places = {device.name: device for device in found.devices}
    assert set(places) == {"cuda:0", "cuda:1", "cpu"}
    dictionary = 4 * (18432 * (2304 + 2304 + 1) + 2304)
    assert places["cuda:0"].parts["dictionary"] == dictionary
    assert places["cuda:0"].peak > 4 * dictionary
    assert places["cuda:1"].parts["language model"] > 4 * 3.2e9
    assert "activation buffer" in places["cpu"].parts or places["cpu"].peak_phase == LOADING
    assert places["cpu"].phases[SHUFFLING] > 2 * 256 * 128 * 2 * 2304 * 4
    assert found.fits
    assert found.time is None
    assert found.advice == []
    for device in found.devices:
        assert sum(device.parts.values()) == device.peak == max(device.phases.values())
        assert tuple(device.phases) == PHASES


def test_the_advice_is_what_it_says() -> None:
    cfg = _gemma(device="cuda", n_batches_in_buffer=4096)
    limits = {"cuda": 24 << 30, "cpu": 64 << 30}
    found = estimate(cfg, available=limits, with_time=False)
    assert found.fits is False
    best = found.advice[0]
    assert best.fits
    for name, value in best.settings.items():
        setattr(cfg, name, value)
    followed = estimate(cfg, available=limits, with_time=False)
    assert followed.fits
    assert {device.name: device.peak for device in followed.devices} == best.peaks


def test_what_helps_but_not_enough_is_said_to_be_so() -> None:
    found = estimate(_gemma(), available={"cpu": 4 << 30}, with_time=False)
    assert found.fits is False
    assert not any(one.fits for one in found.advice)
    saved = [one.saved for one in found.advice]
    assert saved == sorted(saved, reverse=True)
    console = Console(width=80, record=True)
    console.print(found.tables())
    said = console.export_text()
    assert "does not fit" in said
    assert "not enough: --model_from_pretrained_kwargs" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80


def test_a_device_without_any_memory_left_is_too_small_too() -> None:
    found = estimate(_gemma(), available={"cpu": 0}, with_time=False)
    assert found.fits is False
    assert not any(one.fits for one in found.advice)


def test_the_time_is_measured_and_the_numbers_are_json(tiny_model: HookedTransformer) -> None:  # noqa: ARG001
    state = torch.get_rng_state()
    found = estimate(runner_config(transcoder_config()), available={"cpu": 1 << 40})
    assert torch.equal(state, torch.get_rng_state())
    assert found.time is not None
    assert found.time.n_steps == 8
    assert 0 < found.time.step < 10
    numbers = json.loads(found.to_json())
    assert numbers["fits"] is True
    assert numbers["time"]["seconds"] == pytest.approx(found.time.total)
    (cpu,) = numbers["devices"]
    assert cpu["peak_bytes"] == sum(cpu["parts"].values())


def test_a_large_buffer_is_filled_before_the_first_step(tiny_model: HookedTransformer) -> None:  # noqa: ARG001
    found = estimate(runner_config(transcoder_config(), n_batches_in_buffer=4096), available={"cpu": 1 << 40})
    time = found.time
    assert time is not None
    assert time.filling > 0.9 * 1024 * time.language_model  # 4096 prompts, four a batch
    steps = time.first_step + time.step * (time.n_steps - 1)
    assert time.total == pytest.approx(time.filling + steps, rel=0.1)


def test_the_batches_for_the_scale_are_read_before_the_first_step(tiny_model: HookedTransformer) -> None:  # noqa: ARG001
    sae = transcoder_config(normalize_activations="expected_average_only_in")
    cfg = runner_config(sae, n_batches_for_norm_estimate=500)
    time = estimate(cfg, available={"cpu": 1 << 40}).time
    assert time is not None
    n_llm_batches = 500 * cfg.train_batch_size_tokens / time.llm_batch_rows
    assert time.filling > n_llm_batches * time.language_model > time.per_step * time.n_steps


def test_extrapolation_finds_the_time_of_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from saelens_matryoshka.runs import timing

    seen: list[tuple[int, int]] = []

    def seconds(_: Any, rows: int, latents: int) -> tuple[float, float]:
        seen.append((rows, latents))
        later = 2e-9 * rows * latents + 3e-6 * rows + 5e-7 * latents
        return 1.5 * later, later

    monkeypatch.setattr(timing, "_time_step", seconds)
    cfg = _gemma(train_batch_size_tokens=16384)
    first, found, scaled = timing._step_seconds(cfg, budget=1 << 30)
    assert scaled
    assert first == pytest.approx(1.5 * found)
    assert max(rows * latents for rows, latents in seen) < 16384 * 18432 / 8
    assert found == pytest.approx(2e-9 * 16384 * 18432 + 3e-6 * 16384 + 5e-7 * 18432)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hook_name": "blocks.8.hook_nothing"}, "hook_name='blocks.8.hook_nothing'"),
        ({"context_size": 10_000}, "context_size=10000"),
        ({"model_class_name": "HookedMamba"}, "model_class_name='HookedMamba'"),
        ({"n_batches_in_buffer": 1}, "raise n_batches_in_buffer"),
        ({"activations_mixing_fraction": 2.0}, "activations_mixing_fraction=2.0 must be from 0 to 1"),
    ],
)
def test_what_training_would_refuse_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(_gemma(**change), with_time=False)


def test_a_width_that_is_not_the_hooks_is_refused() -> None:
    cfg = runner_config(transcoder_config(d_in=64))
    with pytest.raises(ValueError, match=r"d_in=64.*128 values"):
        estimate(cfg, with_time=False)


@pytest.mark.parametrize("llm_device", ["cpu", "cuda"])
def test_prefetching_adds_the_step_to_the_refill(llm_device: str) -> None:
    plain, prefetching = (
        memory_needs([cfg], trace_forward([cfg], model_shape(cfg)))
        for on in (False, True)
        for cfg in [runner_config(transcoder_config(), prefetch_llm_batches=on, llm_device=llm_device)]
    )
    more = {p: n - by_phase(plain, "cpu")[p] for p, n in by_phase(prefetching, "cpu").items()}
    assert more[LOADING] == 0
    assert more[FILLING] > more[FORWARD]
    (activations,) = (need for need in prefetching if need.what == "its activations")
    assert (SHUFFLING in activations.phases) == (llm_device == "cpu")  # kept by the thread that freed them


def test_dictionaries_in_lockstep_share_the_model_and_take_turns() -> None:
    def peaks(*layers: int, device: str = "cuda") -> dict[str, int]:
        cfgs = [_gemma(device=device, hook_name=f"blocks.{layer}.ln2.hook_normalized") for layer in layers]
        for cfg, layer in zip(cfgs, layers, strict=True):
            cfg.sae.hook_name_out = f"blocks.{layer}.hook_mlp_out"
        needs = memory_needs(cfgs, trace_forward(cfgs, model_shape(cfgs[0])))
        found: dict[str, int] = {}
        for need in needs:
            if BACKWARD in need.phases:
                found[need.what] = found.get(need.what, 0) + need.n_bytes
        return found

    one, two, twice = peaks(8), peaks(7, 8), peaks(8, 8)
    for what in ("dictionary", "Adam's moments", "batch and results"):
        assert two[what] == 2 * one[what]
    for what in ("language model", "gradients", "outputs of the levels"):
        assert two[what] == one[what]
    # on a CPU the buffers are kept, and shared by dictionaries of the same sizes
    one_on_cpu, two_on_cpu = peaks(8, device="cpu"), peaks(7, 8, device="cpu")
    for what in ("gradients", "pre-activations", "outputs of the levels"):
        assert two_on_cpu[what] == one_on_cpu[what]
    assert two[memory_module.BUFFER] == 2 * one[memory_module.BUFFER]
    assert twice[memory_module.BUFFER] == one[memory_module.BUFFER]


def test_a_process_has_its_share_of_the_dictionary_and_of_the_rows() -> None:
    cfg = _gemma(device="cuda")
    trace = trace_forward([cfg], model_shape(cfg))

    def parts(mesh: Mesh) -> dict[str, int]:
        return {
            need.what: need.n_bytes
            for need in memory_needs([cfg], trace, mesh)
            if need.device != "cpu" and BACKWARD in need.phases
        }

    alone, shard, copy, both = (parts(Mesh(*shape)) for shape in ((1, 1), (1, 8), (8, 1), (2, 4)))
    for what in ("dictionary", "gradients", "Adam's moments"):
        assert shard[what] == pytest.approx(alone[what] / 8, rel=1e-3)
        assert both[what] == pytest.approx(alone[what] / 4, rel=1e-3)
        assert copy[what] == alone[what]
    assert copy["buckets of gradients"] == alone["gradients"]
    assert "buckets of gradients" not in shard
    levels = "outputs of the levels"
    assert (shard[levels], copy[levels], both[levels]) == (
        alone[levels],
        alone[levels] / 8,
        alone[levels] / 2,
    )


def test_the_first_process_gathers_the_whole_dictionary_and_its_moments_in_main_memory() -> None:
    cfg = _gemma(device="cuda", act_store_device="cuda")
    trace = trace_forward([cfg], model_shape(cfg))
    saving = {
        shards: by_phase(memory_needs([cfg], trace, Mesh(shards=shards)), "cpu")[SAVING]
        for shards in (1, 8, 64)
    }
    weights = 4 * (18432 * (2304 + 2304 + 1) + 2304)
    assert saving[8] - saving[1] > 2 * weights
    assert saving[64] == saving[8]


def test_a_batch_that_the_processes_cannot_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train_batch_size_tokens=4096 .* among 6\. Take a multiple of 6"):
        estimate(_gemma(), mesh=Mesh(row_blocks=6), with_time=False)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.skipif(Version(version("safetensors")) < Version("0.8"), reason="makes one copy more")
def test_the_state_that_a_process_gives_away_takes_what_is_foretold() -> None:
    cfg = runner_config(transcoder_config(), n_batches_in_buffer=2048)
    shape = model_shape(cfg)
    needs = memory_needs([cfg], trace_forward([cfg], shape), Mesh(row_blocks=2))
    (given,) = (need for need in needs if need.what == "state for the first process")
    assert given.phases == (SAVING,)
    files = sum(need.n_bytes for need in needs if need.what in ("folded copy", "file in the making"))
    waiting = sum(need.n_bytes for need in needs if need.what == memory_module.WAITING)
    foretold = given.n_bytes + files + waiting

    rows, serving = torch.ones(1024 * 32, 256), torch.ones(1024 * 32, 256)
    ctypes.CDLL(None).malloc_trim(0)  # what is free, but still resident, would be used first
    before = _peak_resident()
    content = StoreState(Position(), rows, torch.cat([serving]), random_state(), 2).to_bytes()
    assert foretold == pytest.approx(_peak_resident(reset=False) - before, rel=0.15)
    assert len(content) > rows.nbytes + serving.nbytes


def _peak_resident(*, reset: bool = True) -> int:
    """Bytes of resident memory at the most since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) << 10


# ---- against real runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "tiny SAE, 32,768 latents",
        "tiny, 4 transcoders in lockstep",
        "pythia-70m, prompts of 1,024 tokens",
        "tiny SAE, data parallel on 2",
        "tiny SAE, 2 shards",
    ],
)
def test_the_estimate_is_within_15_percent_of_a_real_run(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    row = compare(case, "cpu", with_time=False)
    assert row["estimated_bytes"] == pytest.approx(row["measured_bytes"], rel=0.15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_estimate_is_within_15_percent_of_a_real_run(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.estimate", "--only", "gpt2 transcoder", "--device", "cuda",
               "--no-time", "--json", str(out)]  # fmt: skip
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (row,) = json.loads(out.read_text())["runs"]
    assert row["estimated_bytes"] == pytest.approx(row["measured_bytes"], rel=0.15)
