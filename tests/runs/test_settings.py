from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from saelens_matryoshka.runs.fields import Given, short_number, whole_number
from saelens_matryoshka.runs.settings import merge, parse_yaml, read_file, read_flags, resolve

FILE = "model_name: tiny\nmapping: mlp\nlayer: 2\nd_sae: 256\nk: 8\n"


def _resolve(flags: str = "", file: str = FILE, preset: str = "{}", **options: Any) -> Any:
    layers = [parse_yaml(preset, "preset p"), parse_yaml(file, "f.yaml"), read_flags(flags.split())]
    return resolve(layers, **options)


def test_flags_win_over_file_over_preset() -> None:
    preset = "lr: 0.1\nseed: 1\ntraining_tokens: 100_000\n"
    settings = _resolve("--seed 3", FILE + "lr: 0.2\nseed: 2\n", preset)
    assert (settings.cfg.seed, settings.cfg.lr, settings.cfg.training_tokens) == (3, 0.2, 100_000)
    origins = {name: settings.given[name].origin for name in ("seed", "lr", "training_tokens", "hook_name")}
    assert origins == {
        "seed": "flag",
        "lr": "f.yaml",
        "training_tokens": "preset p",
        "hook_name": "mapping mlp-2",
    }


def test_the_last_of_several_flags_wins_and_forms_are_equal() -> None:
    assert read_flags(["--seed", "1", "--seed=2"])["seed"].value == "2"
    given = read_flags(
        ["--logger.wandb_project", "p", "--d-sae", "5", "--sae.k", "2", "--sae.dtype", "float32"]
    )
    assert set(given) == {"wandb_project", "d_sae", "k", "sae.dtype"}
    assert read_flags(["--nostreaming"])["streaming"].value is False
    assert read_flags(["-k", "3"])["k"].value == "3"


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("--training_tokens 5e5", "training_tokens", 500_000),
        ("--seqpos_slice 5 -5", "seqpos_slice", (5, -5)),
        ("--exclude_special_tokens True", "exclude_special_tokens", True),
        ("--exclude_special_tokens 1 2", "exclude_special_tokens", [1, 2]),
        ("--prefetch_llm_batches 3", "prefetch_llm_batches", 3),
        ("--sequence_separator_token none", "sequence_separator_token", None),
        ("--sequence_separator_token eos", "sequence_separator_token", "eos"),
        ("--eval_batch_size_prompts None", "eval_batch_size_prompts", None),
        ('--model_kwargs {"a":1}', "model_kwargs", {"a": 1}),
        ("--nostreaming", "streaming", False),
        ("--streaming no", "streaming", False),
        ("--autocast", "autocast", True),
    ],
)
def test_a_flag_is_read_as_its_settings_type(flags: str, name: str, value: object) -> None:
    found = getattr(_resolve(flags).cfg, name)
    assert found == value
    assert type(found) is type(value)


def test_widths_and_weights_are_lists_in_every_form() -> None:
    for flags in ("--matryoshka_widths 32 256", "--matryoshka_widths 32,256", "--matryoshka_widths [32,256]"):
        assert _resolve(flags).cfg.sae.matryoshka_widths == [32, 256]
    assert _resolve("--matryoshka_widths 256").cfg.sae.matryoshka_widths == [256]
    assert _resolve("--matryoshka_widths 32 256 --level_weights 1 0.5").cfg.sae.level_weights == [1, 0.5]


def test_what_no_one_says_is_the_recommended_setting_or_saelens_default() -> None:
    cfg = _resolve().cfg
    assert cfg.sae.matryoshka_widths == [16, 64, 128, 256]
    assert (cfg.lr, cfg.adam_beta1) == (0.007, 0.8)
    assert cfg.lr_warm_up_steps > 0 < cfg.lr_decay_steps
    plain = _resolve("--matryoshka_widths 16 256", recommended=False).cfg
    assert (plain.lr, plain.adam_beta1, plain.lr_decay_steps) == (3e-4, 0.9, 0)
    assert not cfg.logger.log_to_wandb


def test_a_cosine_schedule_is_not_followed_by_the_recommended_decay_to_zero() -> None:
    cfg = _resolve("--lr_scheduler_name cosineannealing --lr_end 1e-5").cfg
    assert (cfg.lr_decay_steps, cfg.lr_end) == (0, 1e-5)


def test_a_moved_mapping_moves_the_hooks_of_the_layers_below() -> None:
    explicit = FILE + "hook_name: blocks.2.ln2.hook_normalized\nhook_name_out: blocks.2.hook_mlp_out\n"
    assert _resolve("--layer 1", explicit).cfg.hook_name == "blocks.1.ln2.hook_normalized"
    assert _resolve("", explicit).mapping == "mlp-2"
    kept = _resolve("--hook_name blocks.2.hook_resid_mid --input_gain none")
    assert kept.cfg.hook_name == "blocks.2.hook_resid_mid"
    assert kept.mapping == "mlp-2+blocks.2.hook_resid_mid"
    crossing = _resolve("--mapping cross-layer:0-3")
    assert crossing.cfg.sae.hook_name_out == "blocks.3.hook_resid_post"


def test_merge_leaves_explicit_hooks_alone_where_there_is_no_mapping() -> None:
    low = {"hook_name": Given("h", "file"), "d_in": Given(5, "file")}
    assert merge([low, {"model_name": Given("gpt2", "flag")}]) == low | {"model_name": Given("gpt2", "flag")}


def test_explicit_hooks_need_no_mapping() -> None:
    file = "model_name: tiny\nhook_name: blocks.1.hook_resid_pre\nd_in: 128\nd_sae: 256\nk: 8\n"
    settings = _resolve("", file)
    assert settings.cfg.sae.architecture() == "matryoshka_sae"
    assert settings.mapping == "blocks.1.hook_resid_pre"
    out = _resolve("--hook_name_out blocks.1.hook_resid_post", file)
    assert out.cfg.sae.architecture() == "matryoshka_transcoder"


def test_values_resolve_to_the_same_config_again() -> None:
    first = _resolve("--level_weights 1 1 1 2 --lr_scheduler_name cosineannealing --seqpos_slice 1 -1")
    text = yaml.safe_dump(
        {name: list(v) if isinstance(v, tuple) else v for name, v in first.values().items()}
    )
    again = resolve([parse_yaml(text, "config.yaml")])
    assert again.cfg == first.cfg
    assert again.mapping == first.mapping


def test_sae_and_logger_may_be_nested_in_a_file() -> None:
    file = "model_name: tiny\nlayer: 1\nsae: {d_sae: 256, k: 4}\nlogger: {wandb_project: mine}\n"
    cfg = _resolve("", file).cfg
    assert (cfg.sae.d_sae, cfg.logger.wandb_project, cfg.hook_name) == (
        256,
        "mine",
        "blocks.1.hook_resid_post",
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--log_every 5", "--log_every is no setting of a run: `train` has it as --log-every."),
        ("--trainin_tokens 5", "--trainin_tokens is not a setting; did you mean training_tokens?"),
        ("--preste tiny", "--preste is not a setting"),
        ("--training_tokens many", "--training_tokens 'many': expected a whole number."),
        ("--training_tokens 1.5", "--training_tokens '1.5': expected a whole number."),
        ("--training_tokens", "--training_tokens without a value: expected a whole number."),
        ("--seed true", "--seed 'true': expected a whole number."),
        ("--lr fast", "--lr 'fast': expected a number."),
        ("--streaming maybe", "--streaming 'maybe': expected true or false."),
        ("--selection rows", "--selection 'rows': expected batch or token."),
        ("--matryoshka_widths a b", "--matryoshka_widths ['a', 'b']: expected a list of whole numbers."),
        ("--level_weights 1 x", "expected a list of numbers or none."),
        ("--model_kwargs notjson", "--model_kwargs 'notjson': expected a mapping."),
        ("--architecture matryoshka_batchtopk", "is SAELens's own"),
        ("--architecture matryoshka_transcode", "did you mean matryoshka_transcoder?"),
        ("--architecture matryoshka_sae --input_gain none", "is a setting of matryoshka_transcoder, not of"),
        ("--checkpoint_path x", "--checkpoint_path: checkpoints are kept in the run's folder."),
        ("--lr_scheduler_name linear", "'linear' of constant, cosineannealing"),
        ("--from_pretrained_path nowhere", "--from_pretrained_path 'nowhere' is no folder"),
        ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint 'nowhere' is no folder"),
        ("--dataset_path nowhere.jsonl", "--dataset_path 'nowhere.jsonl': there is no such file"),
        ("--lr 0", "--lr 0 must be larger than 0"),
        ("--lr -1", "--lr -1 must be larger than 0"),
        ("--training_tokens 10", "is less than one batch"),
        ("--train_batch_size_tokens 0", "--train_batch_size_tokens 0 must be larger than 0"),
        ("--store_batch_size_prompts 0", "store_batch_size_prompts=0 must be a positive integer"),
        ("--lr_warm_up_steps 10000", "do not fit a run of 488 steps"),
        ("--context_size 100000", "--context_size 100000: the model reads at most"),
        ("--model_name gpt22", "model_name='gpt22' is not one that TransformerLens knows. Similar: gpt2"),
        ("--hook_name blocks.2.ln2.hook_normalised", "did you mean 'blocks.2.ln2.hook_normalized'"),
        ("--layer 4", "--layer 4: the model has 4 layers, 0 to 3."),
        ("--layer -1", "--layer -1: the model has 4 layers"),
        ("--mapping mpl", "--mapping 'mpl' is not known; did you mean mlp?"),
        ("--mapping cross-layer:2-9", "layer 9: the model has 4 layers"),
        ("--mapping cross-layer:2-1", "must be later than the source's"),
        ("--mapping cross-layer:1-2 --layer 1", "leave out --layer"),
        ("--architecture matryoshka_sae --mapping cross-layer:1-2", "give --layer 2"),
        ("--d_sae 0", "d_sae=0 must be a positive integer"),
        ("--k 300", "k=300"),
        ("--matryoshka_widths 32 100", "fits d_sae=256 in neither reading"),
    ],
)
def test_bad_input_names_the_setting_and_what_to_do(flags: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        _resolve(flags)
    assert says in str(error.value)


def test_the_buffer_holds_a_batch_unless_a_source_says_otherwise() -> None:
    file = "model_name: tiny\nmapping: mlp\nlayer: 2\nd_sae: 256\nk: 8\ntraining_tokens: 100_000\n"
    settings = _resolve("", file)
    assert settings.cfg.n_batches_in_buffer * settings.cfg.context_size == 8 * 4096
    assert settings.given["n_batches_in_buffer"].origin == "recommended"
    sliced = _resolve("--seqpos_slice 0,64", file).cfg
    assert sliced.n_batches_in_buffer * 64 == 8 * 4096
    assert _resolve("--n_batches_in_buffer 7", file).cfg.n_batches_in_buffer == 7
    assert _resolve("--train_batch_size_tokens 2048", file).cfg.n_batches_in_buffer == 20
    assert _resolve("--matryoshka_widths 16 256", file, recommended=False).cfg.n_batches_in_buffer == 20


def test_sizes_are_checked_without_the_recommended_settings_too() -> None:
    with pytest.raises(ValueError, match="train_batch_size_tokens=0 must be a positive integer"):
        _resolve("--train_batch_size_tokens 0 --matryoshka_widths 16 256", recommended=False)


@pytest.mark.parametrize("name", ["model_name", "d_sae", "k"])
def test_a_missing_setting_is_named(name: str) -> None:
    file = "\n".join(line for line in FILE.splitlines() if not line.startswith(f"{name}:"))
    with pytest.raises(ValueError, match=f"--{name} is needed"):
        _resolve("", file)


def test_a_missing_site_is_named() -> None:
    with pytest.raises(ValueError, match="which activations"):
        _resolve("", "model_name: tiny\nd_sae: 256\nk: 8\n")
    with pytest.raises(ValueError, match="--layer is needed with --mapping mlp: 0 to 3"):
        _resolve("", "model_name: tiny\nd_sae: 256\nk: 8\nmapping: mlp\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("d_sea: 5", r"d_sea \(f.yaml\) is not a setting; did you mean d_sae\?"),
        ("training_tokens: many", r"training_tokens \(f.yaml\) 'many': expected a whole number"),
        ("seed: true", r"seed \(f.yaml\) True: expected a whole number"),
        ("k: [1, 2]\nmodel_name: tiny\nlayer: 1", r"k \(f.yaml\) \[1, 2\]: expected a number"),
        ("model_name: 5", r"model_name \(f.yaml\) 5: expected text, in quotes\."),
        ("- a\n- b", "f.yaml must be a mapping of settings to values"),
        ("", "f.yaml must be a mapping"),
        ("5: 6", "f.yaml must be a mapping"),
        ("a: b: c", "f.yaml is not YAML"),
        ("seed: 1\nseed: 2", "'seed' is there twice"),
        ("seed: 1\nk: 2\nsae: {k: 3}", "f.yaml says k twice"),
        ("!!python/object/apply:os.getcwd []", "f.yaml is not YAML"),
    ],
)
def test_a_bad_file_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        _resolve("--d_sae 256", text)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--config .* cannot be read: No such file"):
        read_file(tmp_path / "no.yaml")
    with pytest.raises(ValueError, match="cannot be read"):
        read_file(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        read_file(tmp_path / "binary.yaml")


def test_a_stray_word_is_refused() -> None:
    with pytest.raises(ValueError, match="'stray' belongs to no flag"):
        read_flags(["stray", "--seed", "1"])


@pytest.mark.parametrize(
    ("text", "number"),
    [("250000", 250_000), ("250_000", 250_000), ("5e7", 50_000_000), ("500k", 500_000), ("1.5M", 1_500_000),
     ("1B", 10**9), ("-3", -3), ("16.0", "16.0"), ("1.5", "1.5"), ("many", "many"), ("", ""), ("M", "M"),
     ("inf", "inf"), ("nan", "nan"), ("1e400M", "1e400M")],
)  # fmt: skip
def test_whole_numbers_have_units(text: str, number: object) -> None:
    assert whole_number(text) == number


def test_tokens_are_given_with_a_unit() -> None:
    assert _resolve("--training_tokens 2M").cfg.training_tokens == 2_000_000


@pytest.mark.parametrize(
    "flags", ["--dataset_path t.jsonl", "--use_cached_activations --cached_activations_path t"]
)
def test_a_relative_path_is_said_to_have_been_looked_for_in_the_current_folder(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"there is no such (file|folder) in {tmp_path}\.$"):
        _resolve(flags)


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (4096, "4.1k"),
        (250_000, "250k"),
        (999_999, "1M"),
        (1.5e9, "1.5B"),
        (123e9, "123B"),
    ],
)
def test_a_number_is_shown_in_three_digits(number: float, shown: str) -> None:
    assert short_number(number) == shown
