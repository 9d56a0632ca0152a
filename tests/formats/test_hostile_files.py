"""Files that are damaged, mislabelled or made to harm: one clear error for each, and nothing of it is run."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from saelens_matryoshka.formats import Folder, FormatError, build, open_source
from saelens_matryoshka.formats.export import export_models
from saelens_matryoshka.formats.files import MAX_CONFIG_BYTES, read_npz, read_pickle, read_safetensors
from saelens_matryoshka.formats.registry import FORMATS, load
from saelens_matryoshka.formats.sources import hub_uri, safe_relative
from tests.formats.coders import D, random_coder

_SPARSIFY = {
    "activation": "topk",
    "expansion_factor": 3,
    "num_latents": 48,
    "k": 5,
    "transcode": True,
    "d_in": D,
}
_TRAINER = {"dict_class": "BatchTopKSAE", "layer": 0, "lm_name": "gpt2", "k": 5}
_LLAMASCOPIUM = {
    "sae_type": "sae",
    "hook_point_in": "blocks.0.hook_resid_post",
    "hook_point_out": "blocks.0.hook_resid_post",
    "d_model": D,
    "expansion_factor": 3,
    "act_fn": "jumprelu",
    "norm_activation": "inference",
}


class _Harm:
    """Unpickled without care, this would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def _tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor | None] = {
        "W_enc": torch.randn(48, D),
        "b_enc": torch.randn(48),
        "W_dec": torch.randn(48, D),
        "b_dec": torch.randn(D),
    }
    return {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}


def _circuit_tracer(folder: Path, config: Any = None, **changes: torch.Tensor | None) -> None:
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    config = {"model_name": "m", "model_kind": "transcoder_set", **hooks, **(config or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    save_file(_tensors(**changes), folder / "layer_0.safetensors")


def _sparsify(folder: Path, **config: Any) -> None:
    (folder / "cfg.json").write_text(json.dumps({**_SPARSIFY, **config}))
    tensors = {"encoder.weight": torch.randn(48, D), "encoder.bias": torch.randn(48)}
    save_file({**tensors, "W_dec": torch.randn(48, D), "b_dec": torch.randn(D)}, folder / "sae.safetensors")


def _pickled(content: Any, *, zipped: bool = True, **trainer: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"trainer": {**_TRAINER, **trainer}}))
        made = content(folder) if callable(content) else content
        torch.save(made, folder / "ae.pt", _use_new_zipfile_serialization=zipped)

    return write


def _batch_topk(**changes: Any) -> dict[str, Any]:
    return {
        "encoder.weight": torch.randn(48, D),
        "encoder.bias": torch.randn(48),
        "decoder.weight": torch.randn(D, 48),
        "b_dec": torch.randn(D),
        "k": torch.tensor(5),
        "threshold": torch.tensor(0.5),
        **changes,
    }


def _header_of(size: int, header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", size if size >= 0 else len(text)) + text


def _safetensors_bytes(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        _circuit_tracer(folder)
        (folder / "layer_0.safetensors").write_bytes(content)

    return write


def _truncated(name: str, write: Callable[[Path], None], keep: float) -> Callable[[Path], None]:
    def write_part(folder: Path) -> None:
        write(folder)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return write_part


def _config(name: str, content: str, write: Callable[[Path], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        write(folder)
        (folder / name).write_text(content)

    return rewrite


def _npz(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        arrays = {
            "W_enc": np.zeros((D, 48), np.float32),
            "W_dec": np.zeros((48, D), np.float32),
            "b_enc": np.zeros(48, np.float32),
            "b_dec": np.zeros(D, np.float32),
            "threshold": np.ones(48, np.float32),
            **changes,
        }
        np.savez(folder / "params.npz", **{name: a for name, a in arrays.items() if a is not None})

    return write


def _npz_bomb(folder: Path) -> None:
    """A few kilobytes that would be 64 MB."""
    zeros = np.zeros((4096, 4096), np.float32)
    np.savez_compressed(folder / "params.npz", W_enc=zeros, W_dec=zeros)


def _npz_that_lies(folder: Path) -> None:
    """An array's header declares a petabyte."""
    _npz()(folder)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": (1 << 24, 1 << 24)}
    )
    with zipfile.ZipFile(folder / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", buffer.getvalue())


def _npz_with_header(header: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with zipfile.ZipFile(folder / "params.npz", "w") as archive:
            archive.writestr("W_enc.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)

    return write


def _npz_twice(folder: Path) -> None:
    _npz()(folder)
    with zipfile.ZipFile(folder / "params.npz", "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("W_enc.npy", archive.read("W_enc.npy"))


def _compressed_pickle(folder: Path) -> None:
    _pickled(_batch_topk())(folder)
    with zipfile.ZipFile(folder / "ae.pt") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "ae.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def _link_out(folder: Path) -> None:
    _circuit_tracer(folder)
    outside = folder.parent.parent / f"outside-{folder.parent.name}.safetensors"
    (folder / "layer_0.safetensors").rename(outside)
    (folder / "layer_0.safetensors").symlink_to(outside)


def _llamascopium(**config: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({**_LLAMASCOPIUM, **config}))
        tensors = {"W_E": torch.randn(D, 48), "b_E": torch.randn(48), "W_D": torch.randn(48, D)}
        threshold = {"activation_function.log_jumprelu_threshold": torch.zeros(48)}
        save_file({**tensors, "b_D": torch.randn(D), **threshold}, folder / "sae_weights.safetensors")

    return write


def _saelens(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        from saelens_matryoshka.formats import build

        build(random_coder()).save_model(folder)
        change(folder)

    return write


def _set(name: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, **fields}))

    return change


_HUGE = {"W_enc": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 4]}}
_SHORT = {"W_enc": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}}
_COLLIDING = {"b_enc": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, **_SHORT}
_DEEP = "[" * 60_000
_ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * [f'*{before}'])}]\n" for before, name in pairwise("abcdefghijk")
)
_THRESHOLDS = {"activation_function.threshold": torch.ones(48)}
_MANY, _NOTHING = 1 << 40, torch.zeros(1)
_EXPANDED = {
    "encoder.weight": _NOTHING.expand(_MANY, D),
    "encoder.bias": _NOTHING.expand(_MANY),
    "decoder.weight": _NOTHING.expand(D, _MANY),
}

# format, what is wrong, how the folder is written, what the error says
TRACER, SPARSIFY, DICTIONARY = "circuit-tracer", "sparsify", "dictionary-learning"
GEMMA, LLAMA, SAELENS = "gemma-scope", "llamascopium", "saelens"

TABLE: list[tuple[str, str, Callable[[Path], None], str]] = [
    # circuit-tracer: safetensors, YAML and the paths in it
    (TRACER, "empty file", _safetensors_bytes(b""), "truncated or not a safetensors"),
    (TRACER, "header longer than the file", _safetensors_bytes(_header_of(1 << 62, {})), "truncated"),
    (TRACER, "header is no JSON", _safetensors_bytes(struct.pack("<Q", 4) + b"nope"), "not a safetensors"),
    (TRACER, "petabytes declared", _safetensors_bytes(_header_of(-1, _HUGE) + bytes(4)), "truncated"),
    (TRACER, "fewer bytes than declared", _safetensors_bytes(_header_of(-1, _SHORT)), "truncated"),
    (TRACER, "overlapping tensors", _safetensors_bytes(_header_of(-1, _COLLIDING) + bytes(16)), "not a"),
    (TRACER, "truncated", _truncated("layer_0.safetensors", _circuit_tracer, 0.7), "truncated"),
    (TRACER, "a pickle by that name", _safetensors_bytes(b"PK\x03\x04" + bytes(60)), "not a safetensors"),
    (TRACER, "a tensor is missing", lambda f: _circuit_tracer(f, W_dec=None), "no tensor 'W_dec'"),
    (TRACER, "a stray tensor", lambda f: _circuit_tracer(f, k=torch.tensor(5.0)), "'k' is not part"),
    (
        TRACER,
        "threshold under another name",
        lambda f: _circuit_tracer(f, threshold=torch.ones(48)),
        "'threshold' is not part",
    ),
    (
        TRACER,
        "widths contradict each other",
        lambda f: _circuit_tracer(f, b_enc=torch.ones(47)),
        r"'b_enc' has shape \[47\], expected \[d_transcoder=48\]",
    ),
    (TRACER, "transposed", lambda f: _circuit_tracer(f, W_enc=torch.ones(D, 48)), "has shape"),
    (TRACER, "NaN", lambda f: _circuit_tracer(f, b_dec=torch.full((D,), torch.nan)), "NaN"),
    (TRACER, "integers", lambda f: _circuit_tracer(f, b_dec=torch.ones(D, dtype=torch.int32)), "floats"),
    (TRACER, "no latents", lambda f: _circuit_tracer(f, W_enc=torch.ones(0, D)), "has shape"),
    (
        TRACER,
        "relu with thresholds",
        lambda f: _circuit_tracer(f, {"activation": "relu"}, **_THRESHOLDS),
        "has thresholds",
    ),
    (
        TRACER,
        "topk without k",
        lambda f: _circuit_tracer(f, {"activation": "topk"}),
        r"k=None must be in 1 \.\. 48",
    ),
    (
        TRACER,
        "a cross-layer transcoder",
        lambda f: _circuit_tracer(f, {"model_kind": "cross_layer_transcoder"}),
        "cross-layer",
    ),
    (TRACER, "hooks are no text", lambda f: _circuit_tracer(f, {"feature_input_hook": 3}), "expected"),
    (
        TRACER,
        "a path out of the folder",
        lambda f: _circuit_tracer(f, {"transcoders": ["../secret.safetensors"]}),
        "leads out of its folder",
    ),
    (
        TRACER,
        "an absolute path",
        lambda f: _circuit_tracer(f, {"transcoders": ["/etc/passwd"]}),
        "leads out of its folder",
    ),
    (
        TRACER,
        "a reference that leads out of the repository",
        lambda f: _circuit_tracer(f, {"transcoders": ["hf://user/repo/../../x"]}),
        "leads out of its folder",
    ),
    (
        TRACER,
        "an odd reference",
        lambda f: _circuit_tracer(f, {"transcoders": ["hf://x"]}),
        "a reference",
    ),
    (TRACER, "too few references", lambda f: _circuit_tracer(f, {"transcoders": []}), "no layer 0"),
    (TRACER, "a link out of the folder", _link_out, "outside of the folder"),
    (
        TRACER,
        "YAML that builds objects",
        _config("config.yaml", "!!python/object/apply:os.mkdir [harm]", _circuit_tracer),
        "not a plain YAML",
    ),
    (TRACER, "YAML nested without end", _config("config.yaml", _DEEP, _circuit_tracer), "not a plain YAML"),
    (
        TRACER,
        "YAML of a few lines that stands for gigabytes",
        _config("config.yaml", f"{_ALIASES}feature_input_hook: *k", _circuit_tracer),
        "it has an alias",
    ),
    (
        TRACER,
        "a file name that no file system takes",
        lambda f: _circuit_tracer(f, {"transcoders": ["x" * 5000]}),
        "has no file 'layers.0.mlp.xxx",
    ),
    (
        TRACER,
        "a megabyte in a field",
        lambda f: _circuit_tracer(f, {"activation": "x" * 60_000}),
        r"xxx \.\.\. xxx",
    ),
    (TRACER, "a list for a config", _config("config.yaml", "[1, 2]", _circuit_tracer), "holds a list"),
    (
        TRACER,
        "a config of many megabytes",
        _config("config.yaml", "a: " + "x" * (MAX_CONFIG_BYTES + 1), _circuit_tracer),
        "a config has at most",
    ),
    # sparsify: JSON that contradicts the tensors
    (SPARSIFY, "broken JSON", _config("cfg.json", "{", _sparsify), "not valid JSON"),
    (SPARSIFY, "JSON nested without end", _config("cfg.json", _DEEP, _sparsify), "not valid JSON"),
    (SPARSIFY, "another number of latents", lambda f: _sparsify(f, num_latents=96), r"expected \[96, 16\]"),
    (
        SPARSIFY,
        "settings for a number",
        lambda f: _sparsify(f, num_latents={"a": 1}),
        "where int is expected",
    ),
    (SPARSIFY, "an escape sequence", lambda f: _sparsify(f, activation="\x1b[31m"), r"activation='.x1b"),
    (SPARSIFY, "a width of text", lambda f: _sparsify(f, d_in="16"), "d_in='16', where int is expected"),
    (SPARSIFY, "k out of range", lambda f: _sparsify(f, k=49), "k=49"),
    (SPARSIFY, "k is no number", lambda f: _sparsify(f, k=True), "k=True"),
    (SPARSIFY, "latents of either sign", lambda f: _sparsify(f, signed=True), "signed=True"),
    (SPARSIFY, "an activation in groups", lambda f: _sparsify(f, activation="groupmax"), "groupmax"),
    (
        SPARSIFY,
        "a skip that is not there",
        lambda f: _sparsify(f, skip_connection=True),
        "W_skip",
    ),
    # dictionary_learning: pickles
    (
        DICTIONARY,
        "code in the pickle",
        _pickled(lambda f: _batch_topk(x=_Harm(f / "h"))),
        "more than tensors",
    ),
    (DICTIONARY, "code and nothing else", _pickled(lambda f: _Harm(f / "harm")), "more than tensors"),
    (DICTIONARY, "an old pickle", _pickled(_batch_topk(), zipped=False), "torch.save"),
    (DICTIONARY, "a compressed pickle", _compressed_pickle, "is compressed"),
    (DICTIONARY, "truncated", _truncated("ae.pt", _pickled(_batch_topk()), 0.6), "truncated"),
    (DICTIONARY, "a number for a name", _pickled({**_batch_topk(), True: torch.ones(1)}), "is called True"),
    (DICTIONARY, "a list", _pickled([torch.ones(3)]), "holds a list"),
    (DICTIONARY, "a text among the tensors", _pickled(_batch_topk(b_dec="zeros")), "'b_dec' is a str"),
    (
        DICTIONARY,
        "four bytes declared to be a tensor of gigabytes",
        _pickled(_batch_topk(**_EXPANDED)),
        "bytes behind it",
    ),
    (
        DICTIONARY,
        "a sparse tensor",
        _pickled(_batch_topk(b_dec=torch.ones(D).to_sparse())),
        "not a plain dense|more than tensors",
    ),
    (DICTIONARY, "another class", _pickled(_batch_topk(), dict_class="IdentityDict"), "IdentityDict"),
    (
        DICTIONARY,
        "another class's tensors",
        _pickled(_batch_topk(), dict_class="MatryoshkaBatchTopKSAE"),
        "no tensor",
    ),
    (
        DICTIONARY,
        "k is no number",
        _pickled(
            {name: tensor for name, tensor in _batch_topk().items() if name != "k"},
            dict_class="AutoEncoderTopK",
            k=True,
        ),
        "k=True must be in 1",
    ),
    (DICTIONARY, "another width", _pickled(_batch_topk(), activation_dim=17), "activation_dim=17"),
    # Gemma Scope: npz
    (GEMMA, "an array of objects", _npz(b_enc=np.array([{}] * 48)), "holds object"),
    (GEMMA, "a thousandfold compressed", _npz_bomb, "as weights never would"),
    (GEMMA, "a petabyte declared", _npz_that_lies, "as weights never would"),
    (GEMMA, "no npz", lambda f: (f / "params.npz").write_bytes(b"not a zip"), "not an .npz"),
    (GEMMA, "truncated", _truncated("params.npz", _npz(), 0.5), "truncated"),
    (GEMMA, "thresholds missing", _npz(threshold=None), "no tensor 'threshold'"),
    (
        GEMMA,
        "a header that calls",
        _npz_with_header(b"__import__('os').mkdir('harm')"),
        "has a damaged header",
    ),
    (GEMMA, "a header without end", _npz_with_header(b"{'descr': " + b"(" * 300), "has a damaged header"),
    (GEMMA, "an array twice", _npz_twice, "holds two arrays 'W_enc'"),
    (GEMMA, "sixteen bytes a number", _npz(b_enc=np.zeros(48, np.longdouble)), "weights are floats"),
    (GEMMA, "integers", _npz(b_enc=np.zeros(48, np.int64)), "holds int64"),
    # llamascopium
    (LLAMA, "a cross-layer transcoder", _llamascopium(sae_type="clt"), "sae_type='clt'"),
    (LLAMA, "selection across tokens", _llamascopium(act_fn="batchtopk"), "batchtopk"),
    (LLAMA, "norms declared and absent", _llamascopium(norm_activation="dataset-wise"), "no tensor"),
    (LLAMA, "normalisation per token", _llamascopium(norm_activation="token-wise"), "token-wise"),
    (LLAMA, "latents without number", _llamascopium(expansion_factor=float("inf")), "no whole number"),
    (LLAMA, "more latents than floats", _llamascopium(expansion_factor=1 << 2000), "expected"),
    (LLAMA, "half a latent", _llamascopium(expansion_factor=3.01), "no whole number"),
    # SAELens
    (SAELENS, "another number of latents", _saelens(_set("cfg.json", d_sae=47)), "make no model"),
    (SAELENS, "an unknown architecture", _saelens(_set("cfg.json", architecture="x")), "none that SAELens"),
    (
        SAELENS,
        "a terabyte declared",
        _saelens(_set("cfg.json", d_sae=1 << 36)),
        "d_sae=68719476736, but tensor",
    ),
    (SAELENS, "metadata that are a number", _saelens(_set("cfg.json", metadata=3)), "metadata=3"),
    (
        SAELENS,
        "widths of text",
        _saelens(_set("cfg.json", metadata={"sae_lens_version": "6", "matryoshka_widths": ["8", 48]})),
        "every width must be a positive integer",
    ),
    (SAELENS, "no config to speak of", _saelens(lambda f: (f / "cfg.json").write_text("[]")), "holds a list"),
]


@pytest.mark.parametrize(
    ("format", "write", "message"),
    [(format, write, message) for format, _, write, message in TABLE],
    ids=[f"{format}: {what}" for format, what, _, _ in TABLE],
)
def test_a_bad_file_gives_one_clear_error(
    format: str, write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "layers.0.mlp"
    folder.mkdir()
    write(folder)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    items = {"circuit-tracer": "layers.0.mlp/layer_0.safetensors"}
    with pytest.raises(FormatError, match=message) as caught:
        load(Folder(tmp_path), items.get(format, "layers.0.mlp"), format)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert sorted(path.name for path in tmp_path.rglob("*")) == before, "it has run something"


@pytest.mark.parametrize("config", [{"k": 0}, {"signed": True}, {"activation": "groupmax"}], ids=str)
def test_a_config_that_cannot_be_read_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "layers.3.mlp"
    folder.mkdir()
    _sparsify(folder, **config)
    with pytest.raises(FormatError, match=re.escape(str(folder / "cfg.json"))):
        load(Folder(tmp_path), folder.name, SPARSIFY)


def test_the_good_files_of_the_table_are_read(tmp_path: Path) -> None:
    writers: dict[str, Callable[[Path], None]] = {
        "circuit-tracer": _circuit_tracer,
        "sparsify": _sparsify,
        "dictionary-learning": _pickled(_batch_topk()),
        "llamascopium": _llamascopium(),
        "saelens": _saelens(lambda _: None),
    }
    for format, write in writers.items():
        folder = tmp_path / format / "layers.0.mlp"
        folder.mkdir(parents=True)
        write(folder)
        (item,) = FORMATS[format].items(Folder(tmp_path), f"{format}/layers.0.mlp")
        assert load(Folder(tmp_path), item, format).d_sae == 48


def test_sizes_are_checked_before_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(4)}, path)
    import saelens_matryoshka.formats.files as files

    def read(*_: Any) -> Any:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(files, "_finite", read)
    with pytest.raises(FormatError, match=r"'b' has shape \[4\], expected \[n=3\]"):
        read_safetensors(path, {"a": ("n",), "b": ("n",)})


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "C:/x", "a\\..\\x", "a\0b"])
def test_no_path_leaves_its_folder(path: str) -> None:
    with pytest.raises(FormatError, match="leads out of its folder"):
        safe_relative(path, "the config")


def test_a_reference_names_repository_path_and_revision() -> None:
    repository, path = hub_uri("hf://user/repo/layers/layer_0.safetensors?revision=v1")
    assert (repository.repo_id, repository.revision, path) == (
        "user/repo",
        "v1",
        "layers/layer_0.safetensors",
    )


def test_what_is_no_source_at_all_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="neither a file nor a folder"):
        open_source(str(tmp_path / "missing"))
    with pytest.raises(FormatError, match="neither a file nor a folder"):
        open_source("no-such-thing")


def test_a_big_endian_array_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "layers.0.mlp"
    folder.mkdir()
    _npz(b_enc=np.arange(48, dtype=">f4"))(folder)
    coder = FORMATS["gemma-scope"].load(Folder(tmp_path), "layers.0.mlp")
    assert coder.b_enc.tolist() == list(range(48))


def test_an_evaluation_of_anything_is_left_out_of_the_card(tmp_path: Path) -> None:
    build(random_coder()).save_model(tmp_path / "model")
    row = {"width": 48, "fvu": 10**400, "l0": "many", "kl": None, "dead_fraction": 0.25}
    (tmp_path / "model" / "evaluation.json").write_text(json.dumps({"prefixes": [row], "n_tokens": {"a": 1}}))
    export_models(tmp_path / "model", "saelens", tmp_path / "out")
    assert "## Metrics" not in (tmp_path / "out" / "README.md").read_text()


def test_a_width_given_twice_is_one_set(tmp_path: Path) -> None:
    build(random_coder()).save_model(tmp_path / "model")
    assert export_models(tmp_path / "model", "saelens", tmp_path / "out", widths=[8, 8]) == [tmp_path / "out"]
    assert (tmp_path / "out" / "cfg.json").is_file()


@pytest.mark.parametrize("read", [read_npz, read_pickle])
def test_a_lack_of_memory_is_no_fault_of_the_file(
    read: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    with path.open("wb") as file:
        np.savez(file, W=np.ones((2, 3)))

    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "load", out_of_memory)
    monkeypatch.setattr(torch, "load", out_of_memory)
    with pytest.raises(MemoryError):
        read(path, {"W": ("a", "b")})
