"""What a cache holds: of which model, hooks and text, in which frame, in which files.

`manifest.json` is rewritten after every shard, so a cache that was being written says what is in it already.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from typing_extensions import Self

from saelens_matryoshka.cache.encoding import DTYPES
from saelens_matryoshka.evaluation.tokens import require_count
from saelens_matryoshka.files.atomic import write_atomically
from saelens_matryoshka.files.fingerprint import hash_of, hash_of_file
from saelens_matryoshka.store.reading import hooks_of

GAINS = "gains.safetensors"
MANIFEST = "manifest.json"
FORMAT = "saelens-matryoshka activation cache, version 1"
Split = Literal["train", "held_out"]

# Fields of SAELens's runner config that say which activations are meant.
RUNNER_FIELDS = (
    "model_name",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "model_kwargs",
    "autocast_lm",
    "dataset_path",
    "context_size",
    "prepend_bos",
    "seqpos_slice",
    "exclude_special_tokens",
    "disable_concat_sequences",
    "sequence_separator_token",
    "use_chat_formatting",
)
_N_SAMPLES, _SAMPLE_BYTES = 16, 1 << 14


class CacheError(ValueError):
    """A cache cannot be read, is not complete, is damaged, or is not of what is asked for."""


@dataclass(frozen=True)
class CacheSettings:
    """What to write. The fields that SAELens's runner config has too mean the same.

    Args:
        model_name: Name of the language model.
        hook_names: The hooks, in any order.
        dataset_path: The text, or what it is called where it is given as a dataset.
        training_tokens: Tokens to write for training, special tokens included.
        held_out_tokens: Tokens of other documents to write for evaluation.
        dtype: "bfloat16", "int8" (a scale per token) or "float32".
        shard_bytes: Size of a file, about; rows are shuffled within one.
        store_batch_size_prompts: Prompts per forward pass.
        seed: Of the shuffling.
    """

    model_name: str
    hook_names: tuple[str, ...]
    dataset_path: str
    training_tokens: int
    held_out_tokens: int = 100_000
    dtype: str = "bfloat16"
    context_size: int = 128
    model_class_name: str = "HookedTransformer"
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    autocast_lm: bool = False
    prepend_bos: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    exclude_special_tokens: bool | list[int] = False
    disable_concat_sequences: bool = False
    sequence_separator_token: int | str | None = "bos"
    use_chat_formatting: bool = False
    streaming: bool = True
    store_batch_size_prompts: int = 32
    shard_bytes: int = 1 << 29
    seed: int = 42

    def __post_init__(self) -> None:
        if not isinstance(self.hook_names, list | tuple):
            raise ValueError(
                f"hook_names={self.hook_names!r} must be a list of hooks, e.g. ['blocks.3.hook_resid_post']."
            )
        if not self.hook_names:
            raise ValueError("hook_names is empty: name the hooks to write.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}.")
        counts = {
            "training_tokens": 1,
            "context_size": 1,
            "store_batch_size_prompts": 1,
            "shard_bytes": 1,
            "held_out_tokens": 0,
        }
        for name, least in counts.items():
            value = getattr(self, name)
            if isinstance(value, float) and value.is_integer():  # 1e6 tokens will do
                value = int(value)
                object.__setattr__(self, name, value)
            require_count(name, value, least)
        if self.model_from_pretrained_kwargs is None:  # as SAELens's runner config
            stock = self.model_class_name == "HookedTransformer"
            object.__setattr__(
                self, "model_from_pretrained_kwargs", {"center_writing_weights": False} if stock else {}
            )
        object.__setattr__(self, "hook_names", tuple(dict.fromkeys(self.hook_names)))

    @classmethod
    def for_runs(cls, cfgs: list[Any], **overrides: Any) -> Self:
        """Everything that some runner configs read: their hooks and targets, of their model and text.

        Raises:
            ValueError: there are none, or they are not of one model and text.
        """
        if not cfgs:
            raise ValueError("cfgs is empty: give the configs of the runs.")
        first = cfgs[0]
        for cfg in cfgs[1:]:
            for name in RUNNER_FIELDS:
                if getattr(cfg, name) != getattr(first, name):
                    raise ValueError(
                        f"{name}: a cache is of one model and text, and these runs have "
                        f"{getattr(first, name)!r} and {getattr(cfg, name)!r}."
                    )
        fields = {name: getattr(first, name) for name in RUNNER_FIELDS}
        own = ("training_tokens", "streaming", "store_batch_size_prompts", "seed")
        return cls(
            hook_names=tuple(hooks_of(cfgs)),
            **{**fields, **{name: getattr(first, name) for name in own}, **overrides},
        )

    def identity(self) -> dict[str, Any]:
        """What must be equal for a cache to be continued, as JSON has it."""
        values = dataclasses.asdict(self)
        del values["streaming"]
        return json.loads(json.dumps(values))


@dataclass(frozen=True)
class Hook:
    """A column."""

    width: int
    """values per token, heads flattened"""
    frame: str
    """as `saelens_matryoshka.sites.norm_frame` says"""


@dataclass(frozen=True)
class Shard:
    """A file of rows."""

    rows: int
    bytes: int
    sha256: str
    """of the whole file"""
    sample: str
    """sha256 of pieces of it, read whenever the cache is opened"""


@dataclass
class Manifest:
    """The contents of a cache."""

    settings: dict[str, Any]
    """`CacheSettings.identity`"""
    hooks: dict[str, Hook]
    """in the order in which the model computes them"""
    same_tensors: list[list[str]]
    """hooks which hold the same values"""
    model_fingerprint: str
    """of the language model's weights"""
    excluded_token_ids: list[int]
    prompts_per_shard: int
    versions: dict[str, str]
    created_at: str
    complete: bool = False
    train: dict[str, Shard] = field(default_factory=dict)
    held_out: dict[str, Shard] = field(default_factory=dict)
    others: dict[str, Shard] = field(default_factory=dict)
    """files without rows: the gains; none in a cache that was written before they were checked"""

    def shards(self, split: Split) -> dict[str, Shard]:
        """The files of a split, by path in the cache."""
        return self.train if split == "train" else self.held_out

    def fingerprint(self) -> str:
        """Of what its rows for training are, and of their order; the same for files that are made again."""
        rows = {name: shard.rows for name, shard in self.train.items()}
        return hash_of([self.settings, self.model_fingerprint, rows])

    def rows(self, split: Split) -> int:
        """Tokens in a split."""
        return sum(shard.rows for shard in self.shards(split).values())

    @property
    def bytes(self) -> int:
        """Of all files of rows."""
        return sum(shard.bytes for split in (self.train, self.held_out) for shard in split.values())

    def save(self, folder: Path) -> None:
        """Write `manifest.json`."""
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)
        write_atomically(folder / MANIFEST, text + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `manifest.json`.

        Raises:
            CacheError: there is none, or it is not one of this format.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise CacheError(
                f"{folder} holds no activation cache: there is no {MANIFEST} in it. Write one with "
                "`saelens-matryoshka cache`."
            )
        try:
            found = json.loads(path.read_text())
            if found.pop("format", None) != FORMAT:
                raise ValueError("its format is another")
            found["hooks"] = {name: Hook(**hook) for name, hook in found["hooks"].items()}
            for kind in ("train", "held_out", "others"):
                found[kind] = {name: Shard(**shard) for name, shard in found.get(kind, {}).items()}
            return cls(**found)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CacheError(f"{path} is not a manifest that can be read: {error}.") from None

    def runner_fields(self) -> dict[str, Any]:
        """Fields for SAELens's runner config under which it trains on this cache."""
        fields = {name: self.settings[name] for name in RUNNER_FIELDS}
        fields["seqpos_slice"] = tuple(fields["seqpos_slice"])
        return fields

    def require_fit(self, cfg: Any, folder: Path) -> None:
        """Check that the activations are those a runner config asks for.

        Raises:
            CacheError: naming the field that differs.
        """
        for name, ours in self.runner_fields().items():
            asked = json.loads(json.dumps(getattr(cfg, name)))
            if asked != json.loads(json.dumps(ours)):
                raise CacheError(
                    f"{name}={getattr(cfg, name)!r}, but the cache {folder} was made with {name}={ours!r}. "
                    "Set it so, or write another cache."
                )
        if cfg.hook_head_index is not None:
            raise CacheError(
                f"hook_head_index={cfg.hook_head_index}: a cache has all heads of a hook as one row. Train "
                "from the language model."
            )
        self.require_hook("hook_name", cfg.hook_name, "d_in", cfg.sae.d_in, folder)
        target = getattr(cfg.sae, "hook_name_out", None)
        if not target:
            return
        self.require_hook("hook_name_out", target, "d_out", cfg.sae.d_out, folder)
        order = list(self.hooks)
        if order.index(target) < order.index(cfg.hook_name):
            raise CacheError(
                f"hook_name_out={target!r} is computed before hook_name={cfg.hook_name!r}: a transcoder "
                "predicts the target from the source. Swap them, or choose a later target."
            )

    def require_hook(
        self, field_name: str, hook: str, width_name: str, width: int | None, folder: Path
    ) -> None:
        """Check that a hook is there, and as wide as it should be.

        Raises:
            CacheError: it is not.
        """
        if hook not in self.hooks:
            raise CacheError(
                f"{field_name}={hook!r} is not in the cache {folder}, which holds {', '.join(self.hooks)}."
            )
        if width != self.hooks[hook].width:
            raise CacheError(
                f"{width_name}={width}, but hook {hook!r} of the cache {folder} has "
                f"{self.hooks[hook].width} values per token. Set {width_name}={self.hooks[hook].width}."
            )


# ---- checksums


def describe_file(path: Path, rows: int) -> Shard:
    """Size and checksums of a file."""
    return Shard(rows, path.stat().st_size, hash_of_file(path), sampled_hash(path))


def sampled_hash(path: Path) -> str:
    """sha256 of the start, the end, and pieces in between."""
    size = path.stat().st_size
    last = max(size - _SAMPLE_BYTES, 0)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for position in sorted({last * i // (_N_SAMPLES - 1) for i in range(_N_SAMPLES)}):
            file.seek(position)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def damage(folder: Path, name: str, shard: Shard, *, fully: bool = False) -> str | None:
    """What is wrong with a file, None if nothing is seen."""
    path = folder / name
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != shard.bytes:
        return f"{path} has {size:,} bytes and not {shard.bytes:,}: it was cut short or changed"
    wrong = hash_of_file(path) != shard.sha256 if fully else sampled_hash(path) != shard.sample
    return f"{path} has another checksum than when it was written: it was changed" if wrong else None
