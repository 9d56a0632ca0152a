"""From training to an attribution graph: transcoders of every MLP, exported for circuit-tracer.

Trains a nested transcoder of each MLP of the tiny embedded model, exports the prefixes of 256 latents as a
set that circuit-tracer loads, and, where circuit-tracer is installed, attributes a prediction to latents:

    pip install circuit-tracer "nnsight<0.8"

Runs offline in a minute or two on a laptop.
"""

import importlib.util
from pathlib import Path

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

import saelens_matryoshka as sm
from saelens_matryoshka import tiny
from saelens_matryoshka.formats.export import export_models

PROMPT = "<bos>import os\nimport sys\n\nclass Reader:\n    def __init__(self, path):\n        self."
LAYERS, WIDTH = range(4), 256
stock, graphs = Path("output/layers"), Path("output/graphs")

model, text = tiny.load_hooked_transformer(), tiny.text.dataset("train")
size = dict(training_tokens=200_000, train_batch_size_tokens=1024)
for layer in LAYERS:
    if (stock / f"layer_{layer}").exists():
        continue
    sae_cfg = sm.MatryoshkaTrainingTranscoderConfig.recommended(
        d_in=128,
        d_sae=1024,
        k=16,
        hook_name_out=f"blocks.{layer}.hook_mlp_out",
        input_gain="norm_weight",
    )
    cfg = LanguageModelSAERunnerConfig(
        sae=sae_cfg,
        hook_name=f"blocks.{layer}.ln2.hook_normalized",
        model_name="tiny",
        dataset_path="the Python standard library",
        context_size=256,
        **size,
        **sm.recommended_runner_fields(sae_cfg, **size),
        store_batch_size_prompts=8,
        n_batches_in_buffer=32,
        exclude_special_tokens=True,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(stock / f"layer_{layer}"),
    )
    LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=text).run()

# The same as: saelens-matryoshka export output/layers --to circuit-tracer --width 256 --out output/graphs
if not graphs.exists():
    export_models(stock, "circuit-tracer", graphs, widths=[WIDTH])
print(f"{graphs}: {', '.join(sorted(path.name for path in graphs.rglob('*') if path.is_file()))}")


def attribution_graph() -> None:
    """Attribute the prediction that follows the prompt, and print the latents behind it."""
    import yaml
    from circuit_tracer import ReplacementModel, attribute
    from circuit_tracer.graph import compute_node_influence
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    # From the hub, after `export --upload USER/REPO`: load_transcoder_from_hub("USER/REPO/...")
    config = yaml.safe_load((graphs / "config.yaml").read_text())
    transcoders = load_transcoder_set(
        {layer: str(graphs / f"layer_{layer}.safetensors") for layer in LAYERS},
        scan="tiny",
        feature_input_hook=config["feature_input_hook"],
        feature_output_hook=config["feature_output_hook"],
        device=torch.device("cpu"),
        lazy_encoder=False,
        lazy_decoder=False,
    )
    replacement = ReplacementModel.from_pretrained_and_transcoders(
        str(tiny.PATH), transcoders, backend="nnsight", device=torch.device("cpu")
    )
    graph = attribute(PROMPT, replacement, max_n_logits=3, batch_size=64, verbose=False)

    n_features, n_logits = len(graph.active_features), len(graph.logit_probabilities)
    tokens = model.to_str_tokens(graph.input_tokens.reshape(1, -1))
    predictions = [
        f"{target.token_str!r} {probability:.2f}"
        for target, probability in zip(graph.logit_targets, graph.logit_probabilities.tolist(), strict=True)
    ]
    print(f"\n{PROMPT!r}\n  → {', '.join(predictions)}")
    print(f"{n_features} active latents, {int((graph.adjacency_matrix != 0).sum()):,} edges")

    weights = torch.zeros(graph.adjacency_matrix.shape[0])
    weights[-n_logits:] = graph.logit_probabilities
    influence = compute_node_influence(graph.adjacency_matrix, weights)[:n_features]
    print("The latents behind these predictions, by their influence through all paths:")
    for node in influence.topk(10).indices.tolist():
        layer, position, latent = graph.active_features[node].tolist()
        token = tokens[position]
        print(f"  {influence[node]:.3f}  layer {layer}, latent {latent:>3}, on token {position} {token!r}")


if importlib.util.find_spec("circuit_tracer") is None:
    print('\nFor the graph: pip install circuit-tracer "nnsight<0.8", and run this again.')
else:
    attribution_graph()
