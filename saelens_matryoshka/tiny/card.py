"""Measures a saved tiny model on the held-out split and writes its model card."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Gemma2ForCausalLM


@dataclass(frozen=True)
class HeldOutFigures:
    """How well a model predicts held-out tokens, beside what token frequencies alone give.

    Attributes:
        loss: mean cross-entropy of the model, in nats per token.
        unigram_entropy: entropy of the held-out tokens' own frequencies, in nats per token; no
            predictor that ignores context can have a lower loss.
        train_unigram_loss: cross-entropy of the held-out tokens under the train split's
            frequencies (with one added to every count), in nats per token.
        n_tokens: how many tokens were predicted.
    """

    loss: float
    unigram_entropy: float
    train_unigram_loss: float
    n_tokens: int


def next_token_loss(model: Gemma2ForCausalLM, batch: Tensor) -> Tensor:
    """Mean next-token cross-entropy of one batch.

    Args:
        model: the model.
        batch: token ids as `packing.windows` gives them, shape (n_windows, context + 1).

    Returns:
        A scalar, in nats per token.
    """
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_figures(
    model: Gemma2ForCausalLM, train_tokens: Tensor, held_out: Tensor, batch_size: int = 32
) -> HeldOutFigures:
    """Computes the figures of the model card.

    Args:
        model: the saved model, loaded again, in eval mode.
        train_tokens: the packed train split, shape (n_train_tokens,).
        held_out: windows of the held-out split, shape (n_windows, context + 1).
        batch_size: windows per forward pass.

    Returns:
        The model's loss and both unigram references, over the same predicted tokens.
    """
    total = sum(next_token_loss(model, batch).item() * len(batch) for batch in held_out.split(batch_size))
    targets = held_out[:, 1:].flatten()
    vocab_size = model.config.vocab_size
    frequencies = torch.bincount(targets, minlength=vocab_size).double() / len(targets)
    train_counts = torch.bincount(train_tokens, minlength=vocab_size).double() + 1.0
    train_frequencies = train_counts / train_counts.sum()
    return HeldOutFigures(
        loss=total / len(held_out),
        unigram_entropy=-torch.special.xlogy(frequencies, frequencies).sum().item(),
        train_unigram_loss=-(frequencies * train_frequencies.log()).sum().item(),
        n_tokens=len(targets),
    )


def write_card(
    folder: Path,
    model: Gemma2ForCausalLM,
    figures: HeldOutFigures,
    *,
    command: str,
    data: str,
    training: Mapping[str, str],
) -> None:
    """Writes `README.md`, the model card, into the weights folder.

    Args:
        folder: where the model was saved.
        model: the saved model, loaded again.
        figures: what it scores on held-out text.
        command: the command line that trained it.
        data: sentence on how much text was used.
        training: rows of the training table.
    """
    config = model.config
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    ratio = figures.loss / figures.unigram_entropy
    training_rows = "\n".join(f"| {name} | {value} |" for name, value in training.items())
    card = f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gemma2, python]
---

# A tiny Gemma-2 model of Python source code

A language model small enough to ship inside a package, for tests, examples and demonstrations that
must run offline and in seconds. It writes text that looks like Python and knows nothing else. It
is a `Gemma2ForCausalLM` trained from scratch; no weights of any other model went into it.

| | |
| --- | --- |
| Parameters | {n_parameters:,} (input and output embeddings tied) |
| Layers | {config.num_hidden_layers} |
| Residual stream | {config.hidden_size} |
| Attention | {config.num_attention_heads} heads of {config.head_dim}, \
{config.num_key_value_heads} key/value heads, scores soft-capped at \
{config.attn_logit_softcapping} |
| Gated MLP | {config.intermediate_size} |
| Logits | soft-capped at {config.final_logit_softcapping} |
| Context | {config.max_position_embeddings} tokens |
| Vocabulary | {config.vocab_size:,} (byte-level BPE; `<bos>`, `<eos>`, `<pad>`) |
| Stored as | float16, loaded as float32 |

## Data

The standard library of Python {platform.python_version()}: the `.py` files, without tests and \
generated tables,
split by a hash of each file's path (`saelens_matryoshka.tiny.text`). {data}
Every training window starts with `<bos>`; documents are separated by `<eos><bos>`.

## Training

`{command}`

| | |
| --- | --- |
{training_rows}

## Held-out figures

Measured by the training script on the saved float16 weights, over {figures.n_tokens:,} tokens:

| | nats per token |
| --- | --- |
| Held-out loss | {figures.loss:.4f} |
| Unigram entropy of the held-out tokens | {figures.unigram_entropy:.4f} |
| Cross-entropy under train-split unigram frequencies | {figures.train_unigram_loss:.4f} |

The loss is {ratio:.0%} of the unigram entropy.

## Licence

The training text is the Python standard library, which is covered by the Python Software
Foundation License Version 2; the model may reproduce short passages of it. The weights were
produced by this package and come under the package's licence.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")
