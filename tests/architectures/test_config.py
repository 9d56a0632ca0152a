from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAEConfig

import saelens_matryoshka as sm
from saelens_matryoshka.plugin import ARCHITECTURES
from saelens_matryoshka.seams import parse_runner_config
from tests.helpers import runner_config, transcoder_config

SAE: dict[str, Any] = {"d_in": 8, "d_sae": 32, "k": 4, "matryoshka_widths": [8, 32]}
TRANSCODER: dict[str, Any] = {**SAE, "hook_name_out": "blocks.0.hook_mlp_out"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"matryoshka_widths": []}, ["matryoshka_widths", "empty"]),
        ({"matryoshka_widths": [16, 8, 32]}, ["matryoshka_widths", "16 is followed by 8"]),
        ({"matryoshka_widths": [8, 16]}, ["matryoshka_widths", "end in d_sae=32", "add up to 24"]),
        ({"d_in": 0}, ["d_in=0"]),
        ({"d_sae": -1}, ["d_sae=-1"]),
        ({"d_sae": 32.0}, ["d_sae=32.0"]),
        ({"k": 0}, ["k=0", "d_sae=32"]),
        ({"k": -1}, ["k=-1"]),
        ({"k": 33}, ["k=33", "d_sae=32"]),
        ({"k": float("nan")}, ["k=nan"]),
        ({"selection": "rows"}, ["selection='rows'", "'batch' or 'token'"]),
        (
            {"selection": "token", "k": 2.5, "threshold_calibration": "l0"},
            ["k=2.5", "whole number"],
        ),
        ({"selection": "token", "threshold_calibration": "ema"}, ["threshold_calibration='l0'"]),
        ({"threshold_calibration": "quantile"}, ["threshold_calibration='quantile'"]),
        ({"level_weights": [1.0]}, ["level_weights=[1.0]", "2 levels"]),
        ({"level_weights": [1.0, -1.0]}, ["level_weights=[1.0, -1.0]"]),
        ({"level_weights": [0.0, 0.0]}, ["level_weights=[0.0, 0.0]", "not all 0"]),
        ({"aux_k": 0}, ["aux_k=0", "positive integer"]),
        ({"l1_coefficient": -1.0}, ["l1_coefficient=-1.0"]),
        ({"aux_loss_coefficient": float("inf")}, ["aux_loss_coefficient=inf"]),
        ({"normalize_activations": "layer_norm"}, ["normalize_activations='layer_norm'"]),
        (
            {"normalize_activations": "constant_norm_rescale"},
            ["normalize_activations='constant_norm_rescale'"],
        ),
        ({"normalize_activations": "zscore"}, ["normalize_activations"]),
    ],
)
@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (sm.MatryoshkaTrainingSAEConfig, SAE),
        (sm.MatryoshkaTrainingTranscoderConfig, TRANSCODER),
        (sm.MatryoshkaTrainingSkipTranscoderConfig, TRANSCODER),
    ],
)
def test_bad_settings_are_refused_when_the_config_is_made(
    config: Any, settings: dict[str, Any], change: dict[str, Any], says: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        config(**{**settings, **change})
    for part in says:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hook_name_out": ""}, "hook_name_out"),
        ({"d_out": 0}, "d_out=0"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
        ({"input_gain": "gain"}, "input_gain='gain'"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
    ],
)
def test_bad_transcoder_settings_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sm.MatryoshkaTrainingTranscoderConfig(**{**TRANSCODER, **change})


def test_a_stock_user_changes_one_word() -> None:
    """Every field of SAELens's own Matryoshka config, with its default, is one of ours."""
    stock = MatryoshkaBatchTopKTrainingSAEConfig(**SAE)
    ours = sm.MatryoshkaTrainingSAEConfig(**SAE)
    for name, value in vars(stock).items():
        if name != "metadata":
            assert getattr(ours, name) == value, name


def test_group_sizes_are_converted_in_the_config() -> None:
    config = sm.MatryoshkaTrainingSAEConfig(**{**SAE, "matryoshka_widths": [8, 24]})
    assert config.matryoshka_widths == [8, 32]


@pytest.mark.parametrize(
    "sae",
    [
        sm.MatryoshkaTrainingSAEConfig(**SAE, level_weights=[1.0, 2.0]),
        sm.MatryoshkaTrainingTranscoderConfig(**TRANSCODER, d_out=5, input_gain="norm_weight"),
        sm.MatryoshkaTrainingSkipTranscoderConfig(
            **TRANSCODER, selection="token", threshold_calibration="l0", l1_coefficient=0.1
        ),
    ],
)
def test_configs_survive_the_round_trip_through_json(sae: Any) -> None:
    as_dict = json.loads(json.dumps(sae.to_dict()))
    assert TrainingSAEConfig.from_dict(as_dict).to_dict() == sae.to_dict()
    runner = runner_config(sae)
    again = LanguageModelSAERunnerConfig.from_dict(json.loads(json.dumps(runner.to_dict())))
    assert type(again.sae) is type(sae)
    assert again.sae.to_dict() == sae.to_dict()


def test_d_out_is_d_in_unless_given() -> None:
    assert sm.MatryoshkaTrainingTranscoderConfig(**TRANSCODER).d_out == 8
    assert sm.MatryoshkaTrainingTranscoderConfig(**TRANSCODER, d_out=5).d_out == 5


def test_metadata_says_what_was_trained() -> None:
    metadata = transcoder_config(selection="token", threshold_calibration="l0").get_inference_sae_cfg_dict()[
        "metadata"
    ]
    assert metadata["matryoshka_widths"] == [32, 96, 256]
    assert metadata["hook_name_out"] == "blocks.2.hook_mlp_out"
    assert "k largest of each token" in metadata["inference_activation"]
    assert metadata["training_architecture"] == "matryoshka_transcoder"


def test_fields_that_are_changed_later_are_checked_and_recorded() -> None:
    cfg = sm.MatryoshkaTrainingSAEConfig(**SAE)
    cfg.matryoshka_widths = [8, 8, 16]
    sae = sm.MatryoshkaTrainingSAE(cfg)
    assert sae.cfg.matryoshka_widths == [8, 16, 32]
    cfg.matryoshka_widths = [4, 32]
    assert sm.matryoshka_widths(sae) == sm.matryoshka_widths(sm.inference_model(sae)) == [4, 32]
    assert cfg.to_dict()["metadata"]["matryoshka_widths"] == [4, 32]
    cfg.matryoshka_widths = [8, 16]
    with pytest.raises(ValueError, match=r"matryoshka_widths=\[8, 16\] fits d_sae=32 in neither"):
        sm.MatryoshkaTrainingSAE(cfg)


@pytest.mark.parametrize(("sae", "cfg"), itertools.permutations(ARCHITECTURES, 2))
def test_a_config_of_another_architecture_is_refused(sae: Any, cfg: Any) -> None:
    fields = SAE if cfg == ARCHITECTURES[0] else TRANSCODER
    says = f"cfg is a {cfg[1].__name__}, and a {sae[0].__name__} is made from a {sae[1].__name__}"
    with pytest.raises(ValueError, match=says):
        sae[0](cfg[1](**fields))


def test_command_line_knows_the_architectures() -> None:
    config = parse_runner_config(
        [
            "--architecture",
            "matryoshka_transcoder",
            "--d_in",
            "32",
            "--d_sae",
            "64",
            "--matryoshka_widths",
            "16",
            "48",
            "--k",
            "4",
            "--hook_name_out",
            "blocks.1.hook_mlp_out",
            "--input_gain",
            "norm_weight",
        ]
    )
    assert isinstance(config.sae, sm.MatryoshkaTrainingTranscoderConfig)
    assert config.sae.matryoshka_widths == [16, 64]
    assert config.sae.input_gain == "norm_weight"


def test_command_line_refuses_bad_widths() -> None:
    with pytest.raises(ValueError, match="matryoshka_widths"):
        parse_runner_config(
            [
                "--architecture",
                "matryoshka_sae",
                "--d_in",
                "32",
                "--d_sae",
                "64",
                "--matryoshka_widths",
                "64",
                "16",
            ]
        )


def test_command_line_keeps_saelens_architectures() -> None:
    config = parse_runner_config(["--architecture", "standard", "--d_in", "32", "--d_sae", "64"])
    assert config.sae.architecture() == "standard"


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (sm.MatryoshkaTrainingSAEConfig, {}),
        (sm.MatryoshkaTrainingTranscoderConfig, {"hook_name_out": "blocks.0.hook_mlp_out"}),
        (sm.MatryoshkaTrainingSkipTranscoderConfig, {"hook_name_out": "blocks.0.hook_mlp_out"}),
    ],
)
def test_recommended_settings_need_sizes_only_and_give_way_to_the_users(
    config: Any, fields: dict[str, Any]
) -> None:
    made = config.recommended(d_in=8, d_sae=64, k=4, **fields)
    assert type(made) is config
    assert made.matryoshka_widths == [4, 16, 32, 64]
    assert made.threshold_calibration == "l0"
    changed = config.recommended(
        d_in=8, d_sae=64, k=4, matryoshka_widths=[64], decoder_init_norm=0.5, **fields
    )
    assert (changed.matryoshka_widths, changed.decoder_init_norm) == ([64], 0.5)


@pytest.mark.parametrize("d_sae", [1, 2, 3, 17])
def test_recommended_widths_are_valid_for_any_number_of_latents(d_sae: int) -> None:
    made = sm.MatryoshkaTrainingSAEConfig.recommended(d_in=8, d_sae=d_sae, k=1)
    assert made.matryoshka_widths[-1] == d_sae


def test_a_transcoders_defaults_are_the_recommended_settings() -> None:
    recommended = sm.MatryoshkaTrainingTranscoderConfig.recommended(**TRANSCODER)
    assert recommended.to_dict() == sm.MatryoshkaTrainingTranscoderConfig(**TRANSCODER).to_dict()


def test_recommended_runner_fields_are_fields_of_the_runners_config() -> None:
    sae = sm.MatryoshkaTrainingSAEConfig.recommended(d_in=128, d_sae=64, k=4)
    size = {"training_tokens": 1_000_000, "train_batch_size_tokens": 500}
    fields = sm.recommended_runner_fields(sae, **size)
    runner = runner_config(sae, **size, **fields)
    assert {name: getattr(runner, name) for name in fields} == fields
    assert fields["lr_warm_up_steps"] + fields["lr_decay_steps"] < 2000
    assert fields["dead_feature_window"] == 40


def test_recommended_learning_rate_falls_with_the_root_of_the_inputs_width() -> None:
    rates = [
        sm.recommended_runner_fields(
            sm.MatryoshkaTrainingSAEConfig.recommended(d_in=d_in, d_sae=64, k=4),
            training_tokens=1000,
            train_batch_size_tokens=10,
        )["lr"]
        for d_in in (100, 10_000)
    ]
    assert rates[0] == pytest.approx(10 * rates[1])


def test_numbers_of_numpy_and_torch_are_taken_and_stored_as_plain_ones() -> None:
    cfg = sm.MatryoshkaTrainingSAEConfig(
        d_in=np.int64(16), d_sae=torch.tensor(64), k=np.float32(4.5), matryoshka_widths=2 ** np.arange(5, 7)
    )  # type: ignore[arg-type]
    assert json.loads(json.dumps(cfg.to_dict()))["k"] == 4.5
    assert cfg.matryoshka_widths == [32, 64]
    sizes: dict[str, Any] = {"d_in": np.int64(16), "d_sae": np.int64(64), "k": np.int64(4)}
    transcoder = sm.MatryoshkaTrainingTranscoderConfig.recommended(
        **sizes, d_out=torch.tensor(8), hook_name_out="mlp"
    )
    stored = json.loads(json.dumps(transcoder.to_dict()))
    assert [stored[name] for name in ("d_in", "d_sae", "k", "d_out")] == [16, 64, 4, 8]


@pytest.mark.parametrize(
    "weights",
    [np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), [np.float32(1), np.int64(2)], (1.0, 2.0)],
)
def test_level_weights_of_numpy_and_torch_are_numbers(weights: Any) -> None:
    cfg = sm.MatryoshkaTrainingSAEConfig(**SAE, level_weights=weights)
    assert cfg.level_weights == [1.0, 2.0]
    assert TrainingSAEConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
