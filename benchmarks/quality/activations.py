"""What all contestants train on and are measured on: one pass of the language model, kept in memory.

Three hooks of one layer are read at once: the *source* and *target* of the transcoders (the MLP's true
input, and what the MLP adds to the residual stream) and the *residual* of the SAEs. The rows are shuffled
once, and every contestant, also one that trains in another environment, sees them in that order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import ActivationsStore
from sae_lens.util import get_special_token_ids
from safetensors.torch import save_file

import saelens_matryoshka as sm
from saelens_matryoshka.sites import norm_frame


@dataclass(frozen=True)
class Hooks:
    """The three hooks of a layer."""

    source: sm.Site
    target: sm.Site
    residual: sm.Site
    input_frame: str
    """of the source, see `saelens_matryoshka.sites.norm_frame`"""

    @classmethod
    def of(cls, model: Any, layer: int) -> Hooks:
        """The MLP of a layer and the residual stream behind it."""
        source = sm.find_site(model, layer, "mlp_in")
        return cls(
            source=source,
            target=sm.find_site(model, layer, "mlp_out"),
            residual=sm.find_site(model, layer, "resid_post"),
            input_frame=norm_frame(model, source.hook_name),
        )


@dataclass(frozen=True)
class Activations:
    """The training rows, in the order everybody sees them, and the tokens for choosing and measuring."""

    hooks: Hooks
    source: torch.Tensor
    """`[n, d_in]`, after the norm's gain"""
    target: torch.Tensor
    """`[n, d_out]`"""
    residual: torch.Tensor
    """`[n, d_model]`"""
    validation: torch.Tensor
    """tokens `[prompts, context_size]` of the training text that are not trained on, for choosing"""
    held_out: torch.Tensor
    """tokens `[prompts, context_size]` of other text, for measuring"""

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, task: str, batch_size: int) -> Iterator[torch.Tensor]:
        """Batches of a task in training order: residuals for "sae", `[source | target]` for the others."""
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            if task == "sae":
                yield self.residual[rows]
            else:
                yield torch.cat([self.source[rows], self.target[rows]], dim=-1)

    def save(self, path: Path) -> None:
        """Write the training rows as safetensors, for contestants that train elsewhere."""
        save_file({"source": self.source, "target": self.target, "residual": self.residual}, path)


@torch.no_grad()
def collect(
    model: Any,
    layer: int,
    train_text: Any,
    held_out_text: Any,
    *,
    n_tokens: int,
    n_validation: int,
    n_held_out: int,
    context_size: int = 256,
    batch_size_prompts: int = 16,
    seed: int = 0,
) -> Activations:
    """Run the language model once over the training text.

    Args:
        model: HookedTransformer or TransformerBridge.
        layer: Whose MLP.
        train_text: Dataset to train and choose on.
        held_out_text: Dataset to measure on.
        n_tokens: Training rows; special tokens are not among them.
        n_validation: Tokens for choosing, about.
        n_held_out: Tokens for measuring, about.
        context_size: Tokens per prompt.
        batch_size_prompts: Prompts per forward pass.
        seed: Of the shuffling.

    Raises:
        ValueError: there is too little text.
    """
    hooks = Hooks.of(model, layer)
    d = model.cfg.d_model
    sites = {"source": hooks.source, "target": hooks.target, "residual": hooks.residual}

    def store_of(text: Any) -> ActivationsStore:
        names = [site.hook_name for site in sites.values()]
        return ActivationsStore.from_config_multi_hook(
            model,
            dataset=text,
            hook_names=names,
            hook_d_ins=dict.fromkeys(names, d),
            context_size=context_size,
            store_batch_size_prompts=batch_size_prompts,
        )

    held_out = _prompts(store_of(held_out_text), n_held_out)
    store = store_of(train_text)
    validation = _prompts(store, n_validation)
    special = torch.tensor(get_special_token_ids(model.tokenizer), dtype=torch.long)
    rows = {name: torch.empty(n_tokens, d) for name in sites}
    filled = 0
    while filled < n_tokens:
        tokens = _batch(store, batch_size_prompts, f"tokens={n_tokens}: there is text for {filled} of them")
        keep = ~torch.isin(tokens.cpu(), special).flatten()
        activations = store.get_multi_hook_activations(tokens)
        n_new = min(int(keep.sum()), n_tokens - filled)
        for name, site in sites.items():
            values = site(activations[site.hook_name]).flatten(0, 1).float().cpu()
            rows[name][filled : filled + n_new] = values[keep][:n_new]
        filled += n_new
    order = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(seed))
    return Activations(
        hooks=hooks,
        validation=validation,
        held_out=held_out,
        **{name: values[order] for name, values in rows.items()},
    )


def _prompts(store: ActivationsStore, n_tokens: int) -> torch.Tensor:
    """About `n_tokens` tokens, `[prompts, context_size]`."""
    n_prompts = -(-n_tokens // store.context_size)
    return _batch(store, n_prompts, f"the text is too short for {n_tokens} tokens to choose or measure on")


def _batch(store: ActivationsStore, n_prompts: int, complaint: str) -> torch.Tensor:
    try:
        return store.get_batch_tokens(n_prompts, raise_at_epoch_end=True)
    except StopIteration:
        raise ValueError(f"{complaint}. Use more text, or fewer tokens.") from None
