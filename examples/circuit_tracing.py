"""From training to an attribution graph: transcoders of every MLP, exported for circuit-tracer.

Takes the transcoders of train_many_layers.py (and trains them first if they are not there), exports the
prefixes of 256 latents as a set that circuit-tracer loads, and, where circuit-tracer is installed, attributes
a prediction to latents:

    pip install circuit-tracer "nnsight<0.8"

Runs offline in a minute or two on a laptop.
"""

import importlib.util
import runpy
from pathlib import Path

import torch

from saelens_matryoshka import tiny
from saelens_matryoshka.formats.export import export_models

PROMPT = "<bos>import os\nimport sys\n\nclass Reader:\n    def __init__(self, path):\n        self."
LAYERS, WIDTH = range(4), 256
stock, graphs = Path("output/layers"), Path("output/graphs")

if not all((stock / f"layer_{layer}").exists() for layer in LAYERS):
    runpy.run_path(str(Path(__file__).with_name("train_many_layers.py")))

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

    tokenizer = tiny.load_tokenizer()
    n_features, n_logits = len(graph.active_features), len(graph.logit_probabilities)
    tokens = [repr(tokenizer.decode([token])) for token in graph.input_tokens.tolist()]
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
        where = f"on token {position} {tokens[position]}"
        print(f"  {influence[node]:.3f}  layer {layer}, latent {latent:>3}, {where}")


if importlib.util.find_spec("circuit_tracer") is None:
    print('\nFor the graph: pip install circuit-tracer "nnsight<0.8", and run this again.')
else:
    attribution_graph()
