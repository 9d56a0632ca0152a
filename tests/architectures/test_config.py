from __future__ import annotations

import json
from typing import Any

import pytest
from sae_lens import LanguageModelSAERunnerConfig, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAEConfig

import saelens_matryoshka as sm
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
