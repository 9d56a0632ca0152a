"""Put a transcoder into the language model, ablate its latents one by one, and steer with one.

SAELens's `HookedSAETransformer.add_sae` reads a transcoder's input at `hook_name` and replaces
`hook_name_out`. With the error term the language model computes exactly what it did, until a latent is
changed. Uses the transcoder of train_transcoder.py, and trains it first if it is not there.
"""

import functools
import runpy
from pathlib import Path

import torch
from sae_lens import SAE, HookedSAETransformer

from saelens_matryoshka import tiny

if not Path("output/transcoder").exists():
    runpy.run_path(str(Path(__file__).with_name("train_transcoder.py")))

# For a model of the hub: HookedSAETransformer.from_pretrained_no_processing("gpt2")
embedded = tiny.load_hooked_transformer()
model = HookedSAETransformer(embedded.cfg, embedded.tokenizer)
model.load_state_dict(embedded.state_dict())
model.eval()

torch.set_grad_enabled(False)
transcoder = SAE.load_from_disk("output/transcoder")
prompt = "<bos>import os\nimport sys\n\nclass Reader:\n    def __init__(self, path):\n        self."
tokens = model.to_tokens(prompt, prepend_bos=False)
clean = model(tokens)[0, -1].log_softmax(-1)
answer = int(clean.argmax())
print(f"{prompt!r}\n  → {model.to_string(answer)!r} with probability {clean[answer].exp():.3f}\n")

model.add_sae(transcoder, use_error_term=True)
latents_hook = f"{transcoder.cfg.metadata.hook_name_out}.hook_sae_acts_post"
logits, cache = model.run_with_cache(tokens)
assert torch.allclose(logits[0, -1].log_softmax(-1), clean, atol=1e-3)
active = cache[latents_hook][0, -1].nonzero().flatten().tolist()
print(f"{len(active)} of {transcoder.cfg.d_sae:,} latents are active on the last token.")


def scale(activations: torch.Tensor, hook: object, latent: int, factor: float) -> torch.Tensor:  # noqa: ARG001
    """Multiply a latent's activation on the last token; 0 ablates it."""
    activations[0, -1, latent] *= factor
    return activations


def log_probs(latent: int, factor: float) -> torch.Tensor:
    """Of the next token, with one latent multiplied."""
    hook = functools.partial(scale, latent=latent, factor=factor)
    return model.run_with_hooks(tokens, fwd_hooks=[(latents_hook, hook)])[0, -1].log_softmax(-1)


def promoted(latent: int) -> list[str]:
    """Tokens whose logits the latent's decoder row raises most, read off the unembedding."""
    top = (transcoder.W_dec[latent] * model.ln_final.w @ model.W_U).topk(5).indices
    return [model.to_string(int(token)) for token in top]


effect = {latent: float(clean[answer] - log_probs(latent, 0.0)[answer]) for latent in active}
print("Ablating one at a time; those that carry the answer most:")
for latent, drop in sorted(effect.items(), key=lambda item: -item[1])[:5]:
    print(f"  latent {latent:>4}: log-probability {-drop:+.3f}; promotes {promoted(latent)}")

strongest = max(effect, key=effect.__getitem__)
print(f"\nSteering with latent {strongest}:")
for factor in (0, 1, 2, 4, 8):
    steered = log_probs(strongest, float(factor))
    best = int(steered.argmax())
    print(
        f"  x{factor}: P({model.to_string(answer)!r}) = {steered[answer].exp():.3f}, "
        f"most likely {model.to_string(best)!r}"
    )
model.reset_saes()
