"""The public classes and functions, called with what they cannot take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput
from transformer_lens import HookedTransformer

import saelens_matryoshka as sm
from saelens_matryoshka.cache import CacheSettings, open_cache, verify_cache
from saelens_matryoshka.formats import Folder, build, converter, open_source
from saelens_matryoshka.formats.coder import SparseCoder
from saelens_matryoshka.formats.export import export_models, import_models
from saelens_matryoshka.formats.frames import to_frame
from saelens_matryoshka.formats.saelens import open_folder
from saelens_matryoshka.formats.thresholds import calibrate, fit_threshold, keep_topk
from saelens_matryoshka.layers import train_layers
from tests.bad_input.case import Case, check_call, rows
from tests.bad_input.conftest import coder

SAE_FIELDS: dict[str, Any] = {"d_in": 8, "d_sae": 32, "k": 4, "matryoshka_widths": [8, 32]}
TRANSCODER_FIELDS = {**SAE_FIELDS, "hook_name_out": "blocks.0.hook_mlp_out"}
CONFIGS: dict[str, Callable[..., Any]] = {
    "sae": lambda **fields: sm.MatryoshkaTrainingSAEConfig(**{**SAE_FIELDS, **fields}),
    "transcoder": lambda **fields: sm.MatryoshkaTrainingTranscoderConfig(**{**TRANSCODER_FIELDS, **fields}),
    "skip": lambda **fields: sm.MatryoshkaTrainingSkipTranscoderConfig(**{**TRANSCODER_FIELDS, **fields}),
    "recommended": lambda **fields: sm.MatryoshkaTrainingSAEConfig.recommended(
        **{"d_in": 8, "d_sae": 32, "k": 4, **fields}
    ),
}
FIELDS = [
    # beside those of tests/architectures/test_config.py: values of another type, and what else is recommended
    Case("sae", {"d_in": "8"}, r"d_in='8' must be a positive integer"),
    Case("sae", {"d_in": True}, r"d_in=True must be a positive integer"),
    Case("sae", {"d_sae": None}, r"d_sae=None must be a positive integer"),
    Case("sae", {"k": "4"}, r"k='4' must be a number larger than 0 and at most d_sae=32"),
    Case("sae", {"k": None}, r"k=None must be a number larger than 0"),
    Case("sae", {"k": True}, r"k=True must be a number larger than 0"),
    Case("sae", {"k": float("inf")}, r"k=inf must be a number larger than 0"),
    Case("sae", {"matryoshka_widths": None}, r"matryoshka_widths=None .*list"),
    Case("sae", {"matryoshka_widths": 32}, r"matryoshka_widths=32 .*list"),
    Case("sae", {"matryoshka_widths": "8,32"}, r"matryoshka_widths='8,32' .*list"),
    Case("sae", {"matryoshka_widths": ["8", "32"]}, r"matryoshka_widths=.*every width must be a positive"),
    Case("sae", {"level_weights": 1.0}, r"level_weights=1\.0 .*one per level"),
    Case("sae", {"level_weights": "ab"}, r"level_weights='ab' .*numbers"),
    Case("sae", {"level_weights": [1.0, "2"]}, r"level_weights=\[1\.0, '2'\] .*numbers"),
    Case("sae", {"use_matryoshka_aux_loss": "no"}, r"use_matryoshka_aux_loss='no' must be True or False"),
    Case("sae", {"rescale_acts_by_decoder_norm": 1}, r"rescale_acts_by_decoder_norm=1 must be True or False"),
    Case("sae", {"apply_b_dec_to_input": None}, r"apply_b_dec_to_input=None must be True or False"),
    Case("sae", {"use_sparse_activations": "x"}, r"use_sparse_activations='x' must be True or False"),
    Case("sae", {"aux_k": 2.5}, r"aux_k=2\.5 must be a positive integer"),
    Case("sae", {"aux_k": "8"}, r"aux_k='8' must be a positive integer"),
    Case("sae", {"l1_coefficient": "0.1"}, r"l1_coefficient='0\.1' must be a finite number, 0 or larger"),
    Case("sae", {"l1_coefficient": None}, r"l1_coefficient=None must be a finite number, 0 or larger"),
    Case("sae", {"aux_loss_coefficient": float("nan")}, r"aux_loss_coefficient=nan must be a finite number"),
    Case("sae", {"decoder_init_norm": -0.1}, r"decoder_init_norm=-0\.1 must be a number larger than 0"),
    Case("sae", {"decoder_init_norm": 0.0}, r"decoder_init_norm=0\.0 must be a number larger than 0"),
    Case("sae", {"decoder_init_norm": "x"}, r"decoder_init_norm='x' must be a number larger than 0"),
    Case("sae", {"topk_threshold_lr": -1.0}, r"topk_threshold_lr=-1\.0 must be a number from 0 to 1"),
    Case("sae", {"topk_threshold_lr": 2.0}, r"topk_threshold_lr=2\.0 must be a number from 0 to 1"),
    Case("sae", {"topk_threshold_lr": float("nan")}, r"topk_threshold_lr=nan must be a number from 0 to 1"),
    Case("sae", {"dtype": "float12"}, r"dtype='float12' must be one of 'float32'"),
    Case("sae", {"dtype": torch.float32}, r"dtype=torch.float32 must be one of .*'torch.float32'"),
    Case("sae", {"dtype": "float16"}, r"dtype='float16': Adam.* underflow.* Use 'bfloat16'"),
    Case("sae", {"device": "nope"}, r"device='nope' is no device: cpu, cuda or cuda:0"),
    Case("sae", {"device": None}, r"device=None is no device"),
    Case("sae", {"metadata": None}, r"metadata=None must be an SAEMetadata"),
    Case(
        "transcoder",
        {"metadata": {"hook_name": "a.b"}},
        r"metadata=\{'hook_name': 'a\.b'\} must be an SAEMetadata",
    ),
    Case("sae", {"selection": None}, r"selection=None must be 'batch' or 'token'"),
    Case("transcoder", {"d_out": "8"}, r"d_out='8' must be a positive integer"),
    Case("transcoder", {"d_out": -8}, r"d_out=-8 must be a positive integer"),
    Case("transcoder", {"hook_name_out": None}, r"hook_name_out=None"),
    Case("transcoder", {"hook_name_out": 3}, r"hook_name_out=3"),
    Case("skip", {"hook_name_out": ""}, r"hook_name_out is empty: name the hook of the transcoder's target"),
    Case("skip", {"input_gain": True}, r"input_gain=True must be 'none' or 'norm_weight'"),
    Case("recommended", {"d_sae": 0}, r"d_sae=0 must be a positive integer"),
    Case("recommended", {"d_sae": "32"}, r"d_sae='32' must be a positive integer"),
    Case("recommended", {"k": 64}, r"k=64 must be a number larger than 0 and at most d_sae=32"),
    Case("recommended", {"k": "4"}, r"k='4' must be a number larger than 0"),
    Case(
        "recommended", {"matryoshka_widths": [4, 8]}, r"matryoshka_widths=\[4, 8\] fits d_sae=32 in neither"
    ),
]


@rows(FIELDS)
def test_a_field_of_a_config_is_refused_when_it_is_made(case: Case) -> None:
    check_call(case, lambda: CONFIGS[case.entry](**case.given))


class Given:
    """What the calls below are made of."""

    def __init__(self, model: HookedTransformer, place: Path) -> None:
        self.model, self.place = model, place
        self.sae: SAE[Any] = build(coder())
        self.topk = build(coder(k=8))
        self.transcoder = build(coder(transcoder=True))
        self.tokens = torch.zeros(2, 32, dtype=torch.long)
        self.coder: SparseCoder = coder()
        self.out = place / "out"


def _without(sae: SAE[Any], **metadata: Any) -> SAE[Any]:
    for name, value in metadata.items():
        setattr(sae.cfg.metadata, name, value)
    return sae


RUN = {"training_tokens": 1000, "train_batch_size_tokens": 10}
CALLS: list[Case] = [
    Case(
        "cumulative_widths []", lambda _: sm.cumulative_widths([], 8), r"matryoshka_widths is empty: give the"
    ),
    Case("cumulative_widths None", lambda _: sm.cumulative_widths(None, 8), r"matryoshka_widths=None .*list"),
    Case("cumulative_widths d_sae", lambda _: sm.cumulative_widths([8], 0), r"d_sae=0 in neither reading"),
    Case("cumulative_widths '8'", lambda _: sm.cumulative_widths([4, 8], "8"), r"d_sae='8' must be an int"),
    Case(
        "decode_prefixes list",
        lambda g: sm.decode_prefixes(g.sae, [[1.0] * 64]),
        r"feature_acts is a list, and must be a tensor",
    ),
    Case(
        "set_input_gain list",
        lambda _: _with_gain([1.0] * 8),
        r"The norm's weight is a list, and must be a tensor",
    ),
    Case(
        "set_input_gain offset",
        lambda _: _with_gain(torch.ones(8), [1.0] * 8),
        r"The norm's bias is a list, and must be a tensor",
    ),
    Case("find_site None", lambda g: sm.find_site(g.model, 0, None), r"name=None is not a known site"),
    Case("train_layers", lambda _: train_layers({"a": CONFIGS["sae"]()}), r"'a' is a MatryoshkaTrainingSAEC"),
    Case(
        "train_layers list",
        lambda _: train_layers([CONFIGS["sae"]()]),
        r"cfgs is a list, and must be a dict of configs by their names",
    ),
    Case("cache tokens '2000'", lambda _: _cache(training_tokens="2000"), r"training_tokens='2000' must be"),
    Case("cache tokens inf", lambda _: _cache(training_tokens=float("inf")), r"training_tokens=inf must be"),
    Case("cache tokens 0", lambda _: _cache(training_tokens=0), r"training_tokens=0 must be at least 1"),
    Case("cache held out", lambda _: _cache(held_out_tokens=-1), r"held_out_tokens=-1 must be at least 0"),
    Case("cache hook", lambda _: _cache(hook_names="a.b"), r"hook_names='a\.b' must be a list of hooks"),
    Case("cache of no runs", lambda _: CacheSettings.for_runs([]), r"cfgs is empty: give the configs"),
    Case("truncate 0", lambda g: sm.truncate(g.sae, 0), r"width=0 must be an integer from 1 to d_sae=64"),
    Case("truncate 65", lambda g: sm.truncate(g.sae, 65), r"width=65 must be an integer from 1 to d_sae=64"),
    Case("truncate 16.0", lambda g: sm.truncate(g.sae, 16.0), r"width=16\.0 must be an integer from 1 to"),
    Case("truncate '16'", lambda g: sm.truncate(g.sae, "16"), r"width='16' must be an integer from 1 to"),
    Case("truncate True", lambda g: sm.truncate(g.sae, True), r"width=True must be an integer from 1 to"),
    Case("truncate topk", lambda g: sm.truncate(g.topk, 16), r"A prefix of a 'topk' model .* Convert it to"),
    Case(
        "truncate path",
        lambda _: sm.truncate("out/sae", 16),
        r"sae='out/sae' is a str, .*load_from_disk\(path",
    ),
    Case(
        "matryoshka_widths path",
        lambda _: sm.matryoshka_widths("out/sae"),
        r"sae='out/sae' is a str, and must",
    ),
    Case(
        "inference_model path",
        lambda _: sm.inference_model("out/sae"),
        r"sae='out/sae' is a str, and must be",
    ),
    Case(
        "decode_prefixes path", lambda g: sm.decode_prefixes("out/sae", g.tokens), r"sae='out/sae' is a str"
    ),
    Case(
        "evaluate path",
        lambda g: sm.evaluate("out/sae", g.model, g.tokens),
        r"sae='out/sae' is a str, and must",
    ),
    Case(
        "compare list",
        lambda g: sm.compare([g.sae], g.model, g.tokens),
        r"saes is a list, and must be a dict of",
    ),
    Case(
        "decode_prefixes scalar",
        lambda g: sm.decode_prefixes(g.sae, torch.tensor(1.0)),
        r"feature_acts has shape \[\], expected",
    ),
    Case(
        "matryoshka_widths",
        lambda g: sm.matryoshka_widths(_without(g.sae, matryoshka_widths=[1, 2])),
        r"matryoshka_widths=\[1, 2\] fits d_sae=64 in neither reading",
    ),
    Case(
        "decode_prefixes",
        lambda g: sm.decode_prefixes(g.sae, torch.zeros(3, 32)),
        r"feature_acts .*\[3, 32\].*64",
    ),
    Case(
        "find_site layer",
        lambda g: sm.find_site(g.model, 4, "mlp_in"),
        r"layer=4, but the model has 4 layers",
    ),
    Case(
        "find_site layer -1", lambda g: sm.find_site(g.model, -1, "mlp_in"), r"layer=-1, but the model has 4"
    ),
    Case(
        "find_site layer 2.0",
        lambda g: sm.find_site(g.model, 2.0, "mlp_in"),
        r"layer=2\.0 must be an integer",
    ),
    Case(
        "find_site layer '2'", lambda g: sm.find_site(g.model, "2", "mlp_in"), r"layer='2' must be an integer"
    ),
    Case(
        "find_site layer True", lambda g: sm.find_site(g.model, True, "mlp_in"), r"layer=True must be an int"
    ),
    Case("find_site name", lambda g: sm.find_site(g.model, 0, "mpl_in"), r"'mpl_in'.*mlp_in"),
    Case("find_site model", lambda _: sm.find_site(torch.nn.Linear(2, 2), 0, "mlp_in"), r"Linear"),
    Case(
        "recommended_runner_fields",
        lambda _: _fields(training_tokens=0),
        r"training_tokens=0 must be a posit",
    ),
    Case(
        "recommended_runner_fields",
        lambda _: _fields(train_batch_size_tokens=0),
        r"train_batch_size_tokens=0 ",
    ),
    Case(
        "recommended_runner_fields",
        lambda _: _fields(training_tokens="1e6"),
        r"training_tokens='1e6' must be a positive .* integer",
    ),
    Case(
        "recommended_runner_fields",
        lambda _: sm.recommended_runner_fields({"d_in": 8}, **RUN),
        r"sae=\{'d_in': 8\} must be the config of",
    ),
    Case("evaluate n_tokens", lambda g: _evaluate(g, n_tokens=0), r"n_tokens=0 must be at least 1"),
    Case(
        "evaluate n_ce_tokens", lambda g: _evaluate(g, n_ce_tokens=-1), r"n_ce_tokens=-1 must be at least 0"
    ),
    Case(
        "evaluate batch",
        lambda g: _evaluate(g, batch_size_prompts=0),
        r"batch_size_prompts=0 must be at least",
    ),
    Case(
        "evaluate batch None",
        lambda g: _evaluate(g, batch_size_prompts=None),
        r"batch_size_prompts=None must be an integer",
    ),
    Case(
        "evaluate half()",
        lambda g: sm.evaluate(g.sae.half(), g.model, g.tokens),
        r"weights are torch.float16, .*sae\.dtype=torch\.float32.*sae\.to\(torch\.float16\)",
    ),
    Case("truncate bfloat16()", lambda g: sm.truncate(g.sae.bfloat16(), 16), r"weights are torch.bfloat16"),
    Case(
        "training step list",
        lambda _: sm.MatryoshkaTrainingSAE(CONFIGS["sae"]()).training_forward_pass(_step([[1.0] * 8])),
        r"sae_in is a list, and must be a tensor",
    ),
    Case(
        "evaluate hook",
        lambda g: _evaluate(g, hook_name="blocks.9.x"),
        r"hook_name='blocks\.9\.x' is not a hook",
    ),
    Case(
        "evaluate target",
        lambda g: _evaluate(g, hook_name_out="blocks.0.x"),
        r"hook_name_out='blocks\.0\.x' is",
    ),
    Case(
        "evaluate no hook", lambda g: _evaluate(g, hook_name=None), r"metadata do not say which hook it reads"
    ),
    Case(
        "evaluate frame", lambda g: _evaluate(g, input_frame="normalized"), r"in the frame 'normalized', but"
    ),
    Case(
        "evaluate width",
        lambda g: _evaluate(g, hook_name="blocks.0.mlp.hook_post"),
        r"d_in=128, but hook .* gives",
    ),
    Case(
        "evaluate target width",
        lambda g: _evaluate(g, hook_name_out="blocks.0.mlp.hook_post"),
        r"d_out=128, but",
    ),
    Case("compare nothing", lambda g: sm.compare({}, g.model, g.tokens), r"saes is empty: give at least one"),
    Case(
        "compare targets",
        lambda g: sm.compare({"a": g.sae, "b": g.transcoder}, g.model, g.tokens),
        r"hook_name_out differs .* Compare models of one target",
    ),
    Case("converter", lambda _: converter("sideways"), r"There is no format 'sideways'; there are saelens"),
    Case(
        "converter widths",
        lambda g: _convert(g, widths=[3]),
        r"matryoshka_widths=\[3\] fits d_sae=64 in neither",
    ),
    Case("converter hook", lambda g: _convert(g, hook_name=" "), r"hook_name=' ' is no hook: name one"),
    Case(
        "open_source", lambda _: open_source("no such thing"), r"neither a file nor a folder here, nor a hub"
    ),
    Case("open_folder", lambda g: open_folder(g.place / "nowhere"), r"nowhere' holds no SAE"),
    Case("Folder.file", lambda g: Folder(g.place).file("../x"), r"path '\.\./x' leads out of its folder"),
    Case(
        "import_models", lambda g: import_models("/nowhere", "saelens", g.out), r"neither a file nor a folder"
    ),
    Case(
        "export_models", lambda g: export_models(g.place / "sae", "npz", g.out), r"There is no format 'npz'"
    ),
    Case(
        "export_models widths",
        lambda g: export_models(g.place / "sae", "saelens", g.out, widths=16),
        r"widths=16 must be a list of widths",
    ),
    Case(
        "open_cache None", lambda _: open_cache(None), r"folder=None must be the path of an activation cache"
    ),
    Case("verify_cache 3", lambda _: verify_cache(3), r"folder=3 must be the path of an activation cache"),
    Case("keep_topk '3'", lambda g: keep_topk(g.coder, "3"), r"k='3' must be in 1 \.\. d_sae=64, an integer"),
    Case(
        "export_models topk",
        lambda g: export_models(g.place / "sae", "sparsify", g.out, topk="3"),
        r"k='3' must be in 1 \.\. d_sae",
    ),
    Case(
        "fit_threshold list", lambda g: fit_threshold(g.coder, [[1.0] * 128], 4), r"rows is a list, and must"
    ),
    Case("keep_topk", lambda g: keep_topk(g.coder, 0), r"k=0 must be in 1 \.\. d_sae=64"),
    Case(
        "fit_threshold",
        lambda g: fit_threshold(g.coder, torch.randn(9, 128), 0),
        r"l0=0 must be larger than 0",
    ),
    Case(
        "fit_threshold rows", lambda g: fit_threshold(g.coder, torch.randn(0, 128), 4), r"rows .*\[0, 128\]"
    ),
    Case(
        "calibrate", lambda g: calibrate(g.coder, g.model, g.tokens), r"does not say its k: give .* \(--l0\)"
    ),
    Case(
        "to_frame",
        lambda g: to_frame(g.coder, "up", g.model),
        r"There is no frame 'up'; there are normalized",
    ),
    Case("SparseCoder", lambda g: g.coder.with_tensors(k=3), r"thresholds or k, not both"),
]


def _fields(**size: Any) -> Any:
    return sm.recommended_runner_fields(CONFIGS["sae"](), **{**RUN, **size})


def _step(batch: Any) -> TrainStepInput:
    return TrainStepInput(
        sae_in=batch, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )


def _with_gain(*norm: Any) -> None:
    cfg = sm.MatryoshkaTrainingTranscoderConfig(**TRANSCODER_FIELDS, input_gain="norm_weight")
    sm.MatryoshkaTrainingTranscoder(cfg).set_input_gain(*norm)


def _cache(**changes: Any) -> CacheSettings:
    fields: dict[str, Any] = {"model_name": "tiny", "hook_names": ["a.b"], "dataset_path": "text"}
    return CacheSettings(**{**fields, "training_tokens": 2000, **changes})


def _evaluate(given: Given, **changes: Any) -> Any:
    metadata = {
        name: changes.pop(name)
        for name in list(changes)
        if name in ("hook_name", "hook_name_out", "input_frame")
    }
    sae = _without(given.sae, **metadata)
    return sm.evaluate(sae, given.model, given.tokens, **{"n_tokens": 64, "n_ce_tokens": 0, **changes})


def _convert(given: Given, **settings: Any) -> Any:
    return SAE.load_from_disk(given.place / "sae", converter=converter("saelens", **settings))


@pytest.mark.parametrize("case", CALLS, ids=[case.entry for case in CALLS])
def test_a_call_is_refused(case: Case, tiny_model: HookedTransformer, place: Path) -> None:
    check_call(case, lambda: case.given(Given(tiny_model, place)), place)


def test_a_whole_number_of_tokens_may_be_written_as_a_float() -> None:
    settings = _cache(training_tokens=1e6)
    assert repr(settings.training_tokens) == "1000000"
