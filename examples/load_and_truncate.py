"""Load a nested transcoder and cut prefixes off it: each is a stock SAELens model of its own.

Uses the transcoder of train_transcoder.py, and trains it first if it is not there.
"""

import runpy
from pathlib import Path

import torch
from sae_lens import SAE

import saelens_matryoshka as sm
from saelens_matryoshka import tiny

if not Path("output/transcoder").exists():
    runpy.run_path(str(Path(__file__).with_name("train_transcoder.py")))

transcoder = SAE.load_from_disk("output/transcoder")  # plain SAELens, which need not know this package
print(f"{type(transcoder).__name__} with prefixes of {sm.matryoshka_widths(transcoder)} latents")
print(f"reads {transcoder.cfg.metadata.hook_name}, predicts {transcoder.cfg.metadata.hook_name_out}\n")

for width in sm.matryoshka_widths(transcoder):
    prefix = sm.truncate(transcoder, width)
    folder = Path("output") / f"transcoder-{width}"
    prefix.save_model(folder)  # a folder like any other of SAELens
    size = (folder / "sae_weights.safetensors").stat().st_size
    print(f"{folder}: {SAE.load_from_disk(folder).cfg.d_sae:>5,} latents, {size / 2**20:.2f} MiB")

# All prefixes at once, each latent decoded once: the coarse prediction first, then its refinements.
model = tiny.load_hooked_transformer()
source, target = "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"
tokens = model.to_tokens("<bos>import os\n\nclass Reader:\n    def __init__(self, path):", prepend_bos=False)
_, cache = model.run_with_cache(tokens)
with torch.no_grad():
    outputs = sm.decode_prefixes(transcoder, transcoder.encode(cache[source]))  # [n_levels, 1, position, d]
    whole = transcoder(cache[source])
assert torch.allclose(outputs[-1], whole, atol=1e-4)  # the last prefix is the whole dictionary
print("\nRelative error on each token, as the prefix grows:")
print(f"{'':12}" + "".join(f"{width:>7,}" for width in sm.matryoshka_widths(transcoder)))
errors = (outputs - cache[target]).norm(dim=-1) / cache[target].norm(dim=-1)  # [n_levels, 1, position]
for position, token in enumerate(model.to_str_tokens(tokens)):
    if position > 0:  # special tokens such as <bos> were not trained on
        print(f"{token!r:12}" + "".join(f"{error:7.2f}" for error in errors[:, 0, position].tolist()))
