"""From the sources of settings to SAELens's runner config.

Settings come from sources, a preset below a file below the flags; the higher wins. What no source says comes,
in this order, from the mapping (hooks and widths), from the recommended settings of the architecture, and
from SAELens's defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.constants import DTYPE_MAP
from sae_lens.training.optim import get_lr_scheduler

from saelens_matryoshka import tiny
from saelens_matryoshka.architectures import MatryoshkaTrainingTranscoderConfig, recommended_runner_fields
from saelens_matryoshka.files.plain_yaml import MAX_YAML_BYTES, PlainLoader, plain_values
from saelens_matryoshka.files.text import is_text_file
from saelens_matryoshka.runner import require_sizes
from saelens_matryoshka.runs.buffer import rows_per_prompt
from saelens_matryoshka.runs.fields import (
    OUR_CONFIGS,
    Field,
    Given,
    canonical,
    fields_of,
    read_value,
    require_our_architecture,
    unknown,
)
from saelens_matryoshka.runs.mappings import (
    DERIVED,
    NoModelConfigError,
    find_mapping,
    skeleton,
)
from saelens_matryoshka.sites import check_hook

SettingsSource = Mapping[str, Given]
"""What a preset, a file or the flags say, by the name of the setting."""

# Settings of ours, beside SAELens's: name and type.
_OURS: dict[str, Any] = {"mapping": str, "layer": int, "architecture": str}
# Flags of `train` that are no settings.
_OF_THE_COMMAND = (
    *("preset", "config", "name", "out", "dry_run", "resume", "wandb", "saelens_defaults"),
    *("layers", "cache", "shard", "shards", "log_every", "keep", "checkpoint_minutes", "skip_bad_batches"),
)
# What SAELens is given here, and where it comes from instead.
_RESERVED = {"checkpoint_path": "checkpoints are kept in the run's folder. Choose it with --out and --name."}
# What another run must not repeat.
_OF_ONE_FOLDER = {*_RESERVED, "output_path", "resume_from_checkpoint", "wandb_id", "run_name"}
# What the file of a finished run says beside its settings.
RECORDS = ("started_at", "completed_at", "versions", "command", "wandb", "upkeep", "lockstep")

_BATCHES_IN_BUFFER = 8  # enough to mix them

TINY_TEXT = "the Python standard library"


@dataclass(frozen=True)
class Settings:
    """The resolved settings of one run."""

    cfg: LanguageModelSAERunnerConfig[Any]
    given: dict[str, Given]
    """what was given, derived from the mapping or recommended; the rest are SAELens's defaults"""
    mapping: str
    """which activations, in a word: "mlp-8" """

    def values(self) -> dict[str, Any]:
        """Every setting by name, as `resolve` takes them: enough to repeat the run."""
        given = {name: one.value for name, one in self.given.items() if name not in _OF_ONE_FOLDER}
        defaults = {
            name: field.default
            for name, field in fields_of(self.cfg.sae.architecture()).items()
            if field.default is not dataclasses.MISSING and name not in _OF_ONE_FOLDER
        }
        return given | {name: value for name, value in defaults.items() if name not in given}


def read_flags(args: Sequence[str]) -> dict[str, Given]:
    """Flags of a command line as settings; the last of several wins.

    `--flag value`, `--flag=value`, `--flag value value` for lists, `--flag` and `--noflag` for what is true
    or false, and `-k`.

    Raises:
        ValueError: a word belongs to no flag.
    """
    found: dict[str, Any] = {}
    name = None
    for word in args:
        if word.startswith("--") or word == "-k":
            name, equals, value = word.lstrip("-").partition("=")
            name = canonical(name)
            found[name] = [value] if equals else []
        elif name is None:
            raise ValueError(f"{word!r} belongs to no flag: flags have the form --name value.")
        else:
            found[name].append(word)
    source = {}
    switches = _switches()
    for name, words in found.items():
        if not words and name.removeprefix("no") in switches and name not in switches:
            source[name.removeprefix("no")] = Given(False, "flag")
        else:
            source[name] = Given(True if not words else words[0] if len(words) == 1 else words, "flag")
    return source


def _switches() -> set[str]:
    return {
        name
        for architecture in OUR_CONFIGS
        for name, field in fields_of(architecture).items()
        if field.hint is bool
    }


def read_file(path: Path) -> dict[str, Given]:
    """Settings of a YAML file, among them a run's own config.yaml.

    Raises:
        ValueError: it cannot be read, or is not a mapping of names to values.
    """
    if path.is_file() and path.stat().st_size > MAX_YAML_BYTES:
        raise ValueError(f"--config {str(path)!r} is larger than any settings: name a YAML file of them.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ValueError(f"--config {str(path)!r} cannot be read: {reason}.") from None
    return {name: given for name, given in parse_yaml(text, str(path)).items() if name not in RECORDS}


def parse_yaml(text: str, origin: str) -> dict[str, Given]:
    """Settings of a YAML text.

    Raises:
        ValueError: it is not YAML, or not a mapping of names to values.
    """
    try:
        values = plain_values(text, _Loader)
    except ValueError as error:
        raise ValueError(f"{origin} is not YAML: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{origin} must be a mapping of settings to values, e.g. `d_sae: 18432`.")
    flat: dict[str, Given] = {}
    for name, value in values.items():
        nested = name in ("sae", "logger") and isinstance(value, dict)
        for inner, one in value.items() if nested else [("", value)]:
            key = canonical(f"{name}.{inner}" if nested else name)
            if key in flat:
                raise ValueError(f"{origin} says {key} twice.")
            flat[key] = Given(one, origin)
    return flat


class _Loader(PlainLoader):
    """YAML in which a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.YAMLError(f"{key.value!r} is there twice")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def merge(sources: Sequence[SettingsSource]) -> dict[str, Given]:
    """What several sources say together, lowest first.

    A source that names a model, an architecture, a mapping or a layer moves the hooks: those of the sources
    below do not hold any more.
    """
    merged: dict[str, Given] = {}
    for source in sources:
        moves = source.keys() & {"mapping", "layer", "model_name", "architecture"}
        if moves and (source.keys() | merged.keys()) & {"mapping", "layer"}:
            for name in DERIVED:
                merged.pop(name, None)
        mapping = str(getattr(source.get("mapping"), "value", ""))
        if mapping.startswith("cross-layer") and "layer" not in source:
            merged.pop("layer", None)  # that of the mapping below
        merged |= source
    return merged


def resolve(sources: Sequence[SettingsSource], *, recommended: bool = True) -> Settings:
    """The runner config that sources of settings describe. Nothing is loaded and nothing is written.

    Args:
        sources: Lowest first.
        recommended: Fill in the architecture's recommended settings where no source says otherwise; else
            SAELens's defaults hold.

    Raises:
        ValueError: a setting is unknown, missing or of another type, or they do not fit each other or the
            model; the message names it and says where it was given.
    """
    given = merge(sources)
    architecture = _architecture(given)
    config_class = OUR_CONFIGS[architecture]
    known = fields_of(architecture)
    for name, one in given.items():
        if name in _RESERVED:
            raise ValueError(f"{one.called(name)}: {_RESERVED[name]}")
        if name not in known and name not in _OURS:
            raise unknown(name, one, architecture, _OURS, _OF_THE_COMMAND)
        hint = _OURS[name] if name in _OURS else known[name].hint
        given[name] = Given(read_value(name, one, hint), one.origin)
    given.setdefault("architecture", Given(architecture, "default"))
    _require(given, "model_name", "a model that TransformerLens knows, e.g. gpt2, or tiny")
    label = _apply_mapping(given, issubclass(config_class, MatryoshkaTrainingTranscoderConfig))
    _apply_defaults(given)
    _require(given, "dataset_path", "text to train on, as datasets.load_dataset takes it")
    _require(given, "d_in", "the width of hook_name, or --layer and --mapping in place of the hooks")
    _require(given, "d_sae", "the number of latents")
    _require(given, "k", "the number of latents active per token, e.g. 64")
    values = {name: one.value for name, one in given.items()}
    _check_devices(values)
    if recommended:
        for name, value in _recommended(config_class, values).items():
            given.setdefault(name, Given(value, "recommended"))
            values.setdefault(name, value)
    cfg = _build(config_class, values)
    _check(cfg)
    return Settings(cfg, given, label)


def require_devices(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Refuse devices that this machine does not have.

    Raises:
        ValueError: naming the setting.
    """
    for name in ("device", "llm_device", "act_store_device"):
        device = getattr(cfg, name)
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ValueError(f"--{name} {device!r} cannot be used here: {reason}.") from None


def _architecture(given: Mapping[str, Given]) -> str:
    if "architecture" in given:
        return require_our_architecture(given["architecture"])
    is_transcoder = {"mapping", "hook_name_out"} & given.keys()
    return "matryoshka_transcoder" if is_transcoder else "matryoshka_sae"


def _require(given: Mapping[str, Given], name: str, what: str) -> None:
    if name not in given:
        raise ValueError(f"--{name} is needed: {what}. Or start from a --preset.")


def _apply_mapping(given: dict[str, Given], transcoder: bool) -> str:
    """Fill in what the mapping gives, check the hooks where the model's structure is known, and name it."""
    stock_model = given.get("model_class_name", Given("HookedTransformer", "")).value == "HookedTransformer"
    mapping, layer = (given[name].value if name in given else None for name in ("mapping", "layer"))
    if mapping is None and layer is None:
        if "hook_name" not in given:
            raise ValueError(
                "which activations? Give --layer, and for a transcoder --mapping; or --hook_name (and "
                "--hook_name_out) with --d_in. Or start from a --preset."
            )
        return _check_and_label(given, transcoder, stock_model)
    if not stock_model:
        raise ValueError(
            "--mapping and --layer name the hooks of a HookedTransformer: with model_class_name="
            f"{given['model_class_name'].value!r} give --hook_name, --hook_name_out and --d_in."
        )
    model = skeleton(given["model_name"].value)
    found = find_mapping(model, mapping, layer, transcoder=transcoder)
    label = found.label
    origin = f"mapping {found.label}"
    for name, value in found.settings().items():
        if name.startswith("hook_name") and name in given and given[name].value != value:
            label = f"{label}+{given[name].value}" if transcoder else given[name].value
        given.setdefault(name, Given(value, origin))
    _check_and_label(given, transcoder, stock_model)
    return label


def _check_and_label(given: Mapping[str, Given], transcoder: bool, stock_model: bool) -> str:
    hooks = [given[name].value for name in ("hook_name", "hook_name_out") if name in given]
    try:
        model = skeleton(given["model_name"].value) if stock_model else None
    except NoModelConfigError:  # found out when the model is loaded
        model = None
    if model is not None:
        check_hook(model, hooks[0], "hook_name")
        if transcoder and any(hooks[1:]):
            check_hook(model, hooks[1], "hook_name_out")
        context = given.get("context_size")
        if context is not None and context.value > model.cfg.n_ctx:
            raise ValueError(
                f"{context.called('context_size')} {context.value}: the model reads at most "
                f"{model.cfg.n_ctx} tokens."
            )
    return "+".join(hooks)


def _apply_defaults(given: dict[str, Given]) -> None:
    """Where this command's defaults are not SAELens's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    defaults: dict[str, Any] = {
        "device": device,
        "log_to_wandb": False,
        "verbose": False,
        "dataset_trust_remote_code": False,
    }
    if given["model_name"].value in tiny.NAMES:
        defaults |= {"dataset_path": TINY_TEXT, "is_dataset_tokenized": False}
    for name, value in defaults.items():
        given.setdefault(name, Given(value, "default"))
    given.setdefault("sae.device", Given(given["device"].value, "device"))


def _recommended(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The recommended value of every setting that has one; of a schedule of the user's own, not its parts."""
    fields = fields_of(config_class.architecture())
    sae_values = _parts(fields, values)["sae"]
    sae = config_class.recommended(**sae_values)
    plain = config_class(**{"matryoshka_widths": sae.matryoshka_widths, **sae_values})
    found: dict[str, Any] = {"matryoshka_widths": sae.matryoshka_widths}
    for name, field in fields.items():
        if field.owner == "sae" and getattr(sae, field.attribute) != getattr(plain, field.attribute):
            found[name] = getattr(sae, field.attribute)
    size = {n: values.get(n, fields[n].default) for n in ("training_tokens", "train_batch_size_tokens")}
    for name, value in size.items():
        if value <= 0:
            raise ValueError(f"--{name} {value} must be larger than 0.")
    found |= recommended_runner_fields(sae, **size)
    found |= _large_enough_buffer({n: values.get(n, field.default) for n, field in fields.items()})
    if values.get("lr_scheduler_name", "constant") != "constant":
        del found["lr_decay_steps"]  # the scheduler itself decays, to lr_end
    return found


def _large_enough_buffer(values: Mapping[str, Any]) -> dict[str, int]:
    """Room for some batches, where SAELens's default has none for one: 20 prompts of 128 tokens for 4,096."""
    batch = values["train_batch_size_tokens"]
    per_prompt = rows_per_prompt(max(0, values["context_size"]), values["seqpos_slice"] or (None,))
    if not 0 < values["n_batches_in_buffer"] * per_prompt < batch:
        return {}
    return {"n_batches_in_buffer": -(-_BATCHES_IN_BUFFER * batch // per_prompt)}


def _build(config_class: type, values: Mapping[str, Any]) -> LanguageModelSAERunnerConfig[Any]:
    fields = fields_of(config_class.architecture())
    parts = _parts(fields, values)
    return LanguageModelSAERunnerConfig(
        sae=config_class(**parts["sae"]),
        logger=LoggingConfig(**parts["logger"]),
        **{"checkpoint_path": None, "output_path": None, **parts["runner"]},
    )


def _check(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Refuse what would be refused later, or a schedule that is longer than the run."""
    require_sizes(cfg)
    if cfg.dtype not in DTYPE_MAP:
        raise ValueError(f"--dtype {cfg.dtype!r} must be one of {', '.join(DTYPE_MAP)}.")
    n_steps, parts = cfg.total_training_steps, ("lr_warm_up_steps", "lr_decay_steps")
    if n_steps < 1:
        raise ValueError(
            f"--training_tokens {cfg.training_tokens} is less than one batch "
            f"(--train_batch_size_tokens {cfg.train_batch_size_tokens})."
        )
    if not cfg.lr > 0:
        raise ValueError(f"--lr {cfg.lr:g} must be larger than 0.")
    if sum(getattr(cfg, part) for part in parts) > n_steps:
        said = " and ".join(f"{part} {getattr(cfg, part)}" for part in parts)
        raise ValueError(f"{said} do not fit a run of {n_steps} steps: lower them, or raise training_tokens.")
    for name in ("resume_from_checkpoint", "from_pretrained_path"):
        if (path := getattr(cfg, name)) is not None and not Path(path).is_dir():
            raise ValueError(f"--{name} {path!r} is no folder.")
    if is_text_file(cfg.dataset_path) and not Path(cfg.dataset_path).is_file():
        raise ValueError(
            f"--dataset_path {cfg.dataset_path!r}: there is no such file{_here(cfg.dataset_path)}."
        )
    cache = cfg.cached_activations_path if cfg.use_cached_activations else None
    if cache is not None and not Path(cache).is_dir():
        raise ValueError(f"--cached_activations_path {cache!r}: there is no such folder{_here(cache)}.")
    trainer = cfg.to_sae_trainer_config()
    assert trainer.lr_end is not None  # the config has put lr / 10
    try:
        get_lr_scheduler(
            trainer.lr_scheduler_name,
            torch.optim.SGD([torch.zeros(1)], lr=trainer.lr),
            training_steps=n_steps,
            lr=trainer.lr,
            warm_up_steps=trainer.lr_warm_up_steps,
            decay_steps=trainer.lr_decay_steps,
            lr_end=trainer.lr_end,
            num_cycles=trainer.n_restart_cycles,
        )
    except (ValueError, ZeroDivisionError) as error:
        schedulers = "constant, cosineannealing, cosineannealingwarmrestarts"
        raise ValueError(
            f"the learning-rate schedule (lr {trainer.lr:g}, lr_end {trainer.lr_end:g}, "
            f"lr_scheduler_name {trainer.lr_scheduler_name!r} of {schedulers}): {error}."
        ) from None


def _here(path: str) -> str:
    """Where a relative path was looked for: a run may be resumed from another folder than its first."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}"


def _check_devices(values: Mapping[str, Any]) -> None:
    """Refuse devices that there are nowhere."""
    for name in ("device", "act_store_device", "llm_device"):
        device = values.get(name)
        if device is None or (name == "act_store_device" and device == "with_model"):
            continue  # it is that of another
        try:
            torch.device(device)
        except RuntimeError:
            raise ValueError(f"--{name} {device!r} is no device: cpu, cuda or cuda:0.") from None


def _parts(fields: Mapping[str, Field], values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by the part of the config they belong to, under their names there."""
    parts: dict[str, dict[str, Any]] = {"runner": {}, "sae": {}, "logger": {}}
    for name, value in values.items():
        if name in fields:
            parts[fields[name].owner][fields[name].attribute] = value
    return parts
