"""circuit-tracer's own code and ours compute the same from the same files, up to an attribution graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import SAE

from saelens_matryoshka import tiny
from saelens_matryoshka.formats import build, converter, from_saelens
from saelens_matryoshka.formats.coder import SparseCoder
from saelens_matryoshka.formats.export import export_models, import_models
from saelens_matryoshka.formats.registry import FORMATS
from saelens_matryoshka.formats.thresholds import calibrate
from tests.formats.coders import LATENTS, D, assert_same, expected_output, inputs, random_coder
from tests.formats.hub_cache import hub_cache, lay_out  # noqa: F401

pytest.importorskip("circuit_tracer", reason="it is not installed: nox -s circuit_tracer")

from circuit_tracer import ReplacementModel, attribute
from circuit_tracer.transcoder import single_layer_transcoder as theirs
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

CPU = torch.device("cpu")
PROMPT = "<bos>def __init__(self, name):\n    self.name ="
N_LAYERS, D_MODEL, WIDTHS = 4, 128, [64, 192, 512]


def _their_transcoder(layer: int, *, threshold: bool, skip: bool) -> Any:
    activation = JumpReLU(torch.rand(LATENTS)) if threshold else torch.nn.functional.relu
    made = theirs.SingleLayerTranscoder(
        D, LATENTS, activation, layer, skip_connection=skip, device=CPU, dtype=torch.float32
    )
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip"):
        if getattr(made, name) is not None:
            torch.nn.init.normal_(getattr(made, name))
    return made


def _load_set(folder: Path, n_layers: int) -> Any:
    paths = {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(n_layers)}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return theirs.load_transcoder_set(
        paths,
        scan="ours",
        feature_input_hook=config["feature_input_hook"],
        feature_output_hook=config["feature_output_hook"],
        device=CPU,
        lazy_encoder=False,
        lazy_decoder=False,
    )


@pytest.mark.parametrize("threshold", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_what_circuit_tracer_writes_computes_the_same_in_saelens(
    tmp_path: Path, threshold: bool, skip: bool
) -> None:
    made = {layer: _their_transcoder(layer, threshold=threshold, skip=skip) for layer in range(2)}
    theirs.TranscoderSet(made, "mlp.hook_in", "hook_mlp_out").to_safetensors(str(tmp_path))
    config = {"model_name": "google/gemma-2-2b", "model_kind": "transcoder_set"}
    config |= {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    x = inputs()
    for layer, transcoder in made.items():
        path = tmp_path / f"layer_{layer}.safetensors"
        ours = SAE.load_from_disk(path, converter=converter("circuit-tracer"))
        torch.testing.assert_close(ours.encode(x), transcoder.encode(x).detach())
        torch.testing.assert_close(ours(x), transcoder(x).detach())
        assert ours.cfg.metadata.hook_name == f"blocks.{layer}.mlp.hook_in"
        assert ours.cfg.metadata.hook_name_out == f"blocks.{layer}.hook_mlp_out"


@pytest.mark.parametrize("kind", [{}, {"skip": True}, {"activation": "relu"}], ids=str)
def test_what_we_write_computes_the_same_in_circuit_tracer(tmp_path: Path, kind: dict[str, Any]) -> None:
    coders = [random_coder(layer=layer, **kind) for layer in range(3)]
    save = FORMATS["circuit-tracer"].save
    save(coders, tmp_path)
    loaded = _load_set(tmp_path, 3)
    assert loaded.feature_input_hook == "ln2.hook_normalized"
    x = inputs()
    for coder, transcoder in zip(coders, loaded, strict=True):
        torch.testing.assert_close(transcoder(x).detach(), expected_output(coder, x))
    # and what it writes again is what we wrote
    (tmp_path / "again").mkdir()
    loaded.to_safetensors(str(tmp_path / "again"))
    (tmp_path / "again" / "config.yaml").write_bytes((tmp_path / "config.yaml").read_bytes())
    for layer, coder in enumerate(coders):
        path = tmp_path / "again" / f"layer_{layer}"
        assert_same(from_saelens(SAE.load_from_disk(path, converter=converter("circuit-tracer"))), coder)


# ---- to the end: a set of all layers of the embedded model, and a graph of a prompt


def _topk_transcoder(layer: int) -> SparseCoder:
    """A TopK transcoder of the embedded model: random features, each of which writes something of its own."""
    generator = torch.Generator().manual_seed(layer)
    W_enc = torch.randn(D_MODEL, WIDTHS[-1], generator=generator)
    return SparseCoder(
        W_enc=W_enc / W_enc.norm(dim=0),
        b_enc=torch.zeros(WIDTHS[-1]),
        W_dec=0.3 * torch.randn(WIDTHS[-1], D_MODEL, generator=generator),
        b_dec=0.1 * torch.randn(D_MODEL, generator=generator),
        k=8,
        metadata={
            "model_name": "tiny",
            "hook_name": f"blocks.{layer}.ln2.hook_normalized",
            "hook_name_out": f"blocks.{layer}.hook_mlp_out",
            "input_frame": "normalized",
            "matryoshka_widths": WIDTHS,
            "context_size": 64,
        },
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set as `export --to circuit-tracer --calibrate-l0 --width 192 --width 512` writes it."""
    folder = tmp_path_factory.mktemp("exported")
    for layer in range(N_LAYERS):
        build(_topk_transcoder(layer)).save_model(folder / "stock" / f"layer_{layer}")
    model, text = tiny.load_hooked_transformer(), tiny.text.dataset("held_out")
    export_models(
        folder / "stock",
        "circuit-tracer",
        folder / "out",
        widths=[192, 512],
        change=lambda coder: calibrate(coder, model, text, n_tokens=2_000),
        repo_id="me/graphs",
    )
    return folder / "out"


def _replacement_model(backend: str, transcoders: Any) -> Any:
    if backend == "nnsight":
        pytest.importorskip("nnsight.intervention.tracing", reason="circuit-tracer wants an older nnsight")
        return ReplacementModel.from_pretrained_and_transcoders(
            str(tiny.PATH), transcoders, backend="nnsight", device=CPU
        )
    original = tiny.load_hooked_transformer()
    model = ReplacementModel.from_config(original.cfg, transcoders, tokenizer=tiny.load_tokenizer())
    # the same weights, under the names that circuit-tracer's wrappers give them
    renamed = {
        name.replace(".mlp.", ".mlp.old_mlp.").replace("unembed.", "unembed.old_unembed."): tensor
        for name, tensor in original.state_dict().items()
    }
    missing = model.load_state_dict(renamed, strict=False).missing_keys
    assert not [name for name in missing if not name.startswith("transcoders.")]
    return model


@pytest.mark.parametrize("backend", ["transformerlens", "nnsight"])
@pytest.mark.parametrize("width", [192, 512])
def test_an_exported_prefix_is_loaded_from_the_hub_and_gives_an_attribution_graph(
    exported: Path,
    hub_cache: Path,  # noqa: F811
    backend: str,
    width: int,
) -> None:
    lay_out(hub_cache, "me/graphs", exported)
    transcoders, config = load_transcoder_from_hub(f"me/graphs/width_{width}", device=CPU, lazy_decoder=False)
    assert config["feature_input_hook"] == "ln2.hook_normalized"
    assert len(transcoders) == N_LAYERS
    graph = attribute(PROMPT, _replacement_model(backend, transcoders), max_n_logits=3, batch_size=64)

    # The graph's features are those that the stock transcoders fire on this prompt, as strongly.
    model = tiny.load_hooked_transformer()
    _, cache = model.run_with_cache(graph.input_tokens.reshape(1, -1))
    active = torch.zeros(N_LAYERS, graph.n_pos, width)
    found = graph.active_features
    active[found[:, 0], found[:, 1], found[:, 2]] = graph.activation_values.detach()
    for layer in range(N_LAYERS):
        path = exported / f"width_{width}" / f"layer_{layer}"
        ours = SAE.load_from_disk(path, converter=converter("circuit-tracer"))
        expected = ours.encode(cache[f"blocks.{layer}.ln2.hook_normalized"][0]).detach()
        expected[0] = 0  # the tracer leaves the first position out
        torch.testing.assert_close(active[layer], expected, atol=1e-4, rtol=1e-4)
    n_features = len(found)
    assert 2 < n_features / (N_LAYERS * (graph.n_pos - 1)) < 20, "thresholds were lost"
    assert graph.adjacency_matrix.shape[0] == n_features + (N_LAYERS + 1) * graph.n_pos + 3
    assert torch.isfinite(graph.adjacency_matrix).all()
    assert (graph.adjacency_matrix[-3:, :n_features] != 0).any(), "no feature reaches a logit"


def test_both_of_its_backends_find_the_same_graph(exported: Path) -> None:
    graphs = [
        attribute(
            PROMPT,
            _replacement_model(backend, _load_set(exported / "width_192", N_LAYERS)),
            max_n_logits=3,
            batch_size=64,
        )
        for backend in ("transformerlens", "nnsight")
    ]
    first, second = (graph.adjacency_matrix for graph in graphs)
    torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)


def test_the_exported_set_comes_back_as_stock_transcoders(exported: Path, tmp_path: Path) -> None:
    models = import_models(str(exported / "width_512"), "circuit-tracer", tmp_path / "back")
    assert [model.name for model in models] == [f"layer_{layer}" for layer in range(N_LAYERS)]
    for layer in range(N_LAYERS):
        sae = SAE.load_from_disk(tmp_path / "back" / f"layer_{layer}")
        assert sae.cfg.architecture() == "jumprelu_transcoder"
        original = _topk_transcoder(layer)
        assert torch.equal(sae.W_enc, original.W_enc)
        assert sae.cfg.metadata.matryoshka_widths == WIDTHS


def test_its_viewers_model_reads_the_feature_files_of_every_layer(exported: Path, tmp_path: Path) -> None:
    from circuit_tracer.frontend.feature_models import Model

    from saelens_matryoshka.report import collect_samples
    from saelens_matryoshka.report.feature_files import read_feature, write_feature_files
    from saelens_matryoshka.report.logits import logit_effects
    from saelens_matryoshka.report.text import TokenText

    model, text = tiny.load_hooked_transformer(), tiny.text.dataset("held_out")
    for layer in range(2):
        path = exported / "width_192" / f"layer_{layer}"
        sae = SAE.load_from_disk(path, converter=converter("circuit-tracer"))
        found = collect_samples(sae, model, text, n_tokens=2_000, n_top=3, per_interval=1, context_size=64)
        tokens, logits = TokenText(model.tokenizer), logit_effects(sae, model)
        write_feature_files(found, tokens, tmp_path, layer=layer, transcoder_id="ours", logits=logits)
    for layer in range(2):
        for latent in range(192):
            feature = read_feature(tmp_path, layer, latent)
            assert Model.model_validate(feature, strict=True).model_dump() == feature
