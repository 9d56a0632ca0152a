"""Passages in which a latent fires, strongly and weakly, and random ones, for descriptions and their scores.

As in SAEBench's autointerp, whose settings and prompts are used: a description is made from the strongest
passages and from weaker ones, drawn in proportion to the squared activation, and is scored on other strong
and weak ones among random ones. Unlike there, a random passage in which the latent fires counts as one in
which it fires, strong and weak passages do not overlap, and a latent that always fires equally strongly is
not left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sae_lens import SAE

from saelens_matryoshka.evaluation.activations import hook_activations
from saelens_matryoshka.evaluation.tokens import is_excluded, special_token_ids


class Examples(NamedTuple):
    """What one latent is described from, and scored on: SAEBench's `Examples`."""

    generation: Any
    scoring: Any


@torch.no_grad()
def activations(
    sae: SAE[Any], model: Any, tokens: torch.Tensor, latents: list[int], batch_size: int
) -> torch.Tensor:
    """Activations of some latents, in bfloat16, 0 at special tokens.

    Args:
        sae: SAE or transcoder.
        model: HookedTransformer.
        tokens: `[prompts, context_size]`.
        latents: Which ones.
        batch_size: Prompts per forward pass.

    Returns:
        `[n_latents, prompts, context_size]` on the CPU.
    """
    name, special = sae.cfg.metadata.hook_name, special_token_ids(model, True)
    parts = []
    for batch in tokens.split(batch_size):
        acts = sae.encode(hook_activations(model, batch, [name])[name].to(sae.device))[..., latents]
        acts = acts * ~is_excluded(batch, special).to(acts.device)[..., None]
        parts.append(acts.permute(2, 0, 1).to("cpu", torch.bfloat16))
    return torch.cat(parts, dim=1)


def examples_of(
    acts: torch.Tensor, tokens: torch.Tensor, model: Any, config: Any, generator: torch.Generator
) -> Examples | None:
    """Passages for one latent.

    Args:
        acts: The latent's activations `[prompts, context_size]`.
        tokens: `[prompts, context_size]`.
        model: HookedTransformer, for its tokenizer.
        config: SAEBench's `AutoInterpEvalConfig`.
        generator: For what is drawn at random.

    Returns:
        The passages; None if the latent fires in fewer than the strongest passages that are asked for.
    """
    acts = acts.float()
    strong, rest = _strongest(acts, config.n_top_ex, config.buffer)
    if len(strong) < config.n_top_ex:
        return None
    weak = _sampled(rest, config.n_iw_sampled_ex, config.buffer, generator)
    shape, last = (config.n_random_ex_for_scoring,), acts.shape[1] - config.buffer
    rows = torch.randint(len(acts), shape, generator=generator).tolist()
    columns = torch.randint(config.buffer, last, shape, generator=generator).tolist()

    strong = [strong[i] for i in torch.randperm(len(strong), generator=generator).tolist()]
    # Of fewer weak passages than are asked for, the same shares go to both.
    n_weak = round(len(weak) * config.n_iw_sampled_ex_for_generation / max(config.n_iw_sampled_ex, 1))
    generation = strong[: config.n_top_ex_for_generation] + weak[:n_weak]
    scoring = strong[config.n_top_ex_for_generation :] + weak[n_weak:]
    scoring += list(zip(rows, columns, strict=True))
    scoring = [scoring[i] for i in torch.randperm(len(scoring), generator=generator).tolist()]
    return Examples(
        _passages(generation, acts, tokens, model, config, by_strength=True),
        _passages(scoring, acts, tokens, model, config, by_strength=False),
    )


def _strongest(acts: torch.Tensor, n: int, buffer: int) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """Positions of the n strongest firings whose passages do not overlap; the activations beside them."""
    rest = _centres(acts, buffer)
    found: list[tuple[int, int]] = []
    while len(found) < n:
        row, column = divmod(int(rest.argmax()), rest.shape[1])
        if rest[row, column] <= 0:
            break
        found.append((row, column))
        _clear(rest, row, column, buffer)
    return found, rest


def _sampled(rest: torch.Tensor, n: int, buffer: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Up to n positions drawn in proportion to the squared activation; their passages do not overlap."""
    rest, found = rest.clone(), []
    while len(found) < n and bool(rest.any()):
        # not torch.multinomial, which takes no more than 2^24 weights
        cumulative = rest.double().pow(2).flatten().cumsum(dim=0)
        drawn = torch.rand((), dtype=torch.double, generator=generator) * cumulative[-1]
        position = int(torch.searchsorted(cumulative, drawn, right=True).clamp(max=rest.numel() - 1))
        row, column = divmod(position, rest.shape[1])
        found.append((row, column))
        _clear(rest, row, column, buffer)
    return found


def _centres(acts: torch.Tensor, buffer: int) -> torch.Tensor:
    """The activations where a whole passage fits around, 0 elsewhere."""
    centres = torch.zeros_like(acts)
    centres[:, buffer : acts.shape[1] - buffer] = acts[:, buffer : acts.shape[1] - buffer]
    return centres


def _clear(rest: torch.Tensor, row: int, column: int, buffer: int) -> None:
    rest[row, max(column - 2 * buffer, 0) : column + 2 * buffer + 1] = 0


def _passages(
    positions: list[tuple[int, int]],
    acts: torch.Tensor,
    tokens: torch.Tensor,
    model: Any,
    config: Any,
    *,
    by_strength: bool,
) -> Any:
    from sae_bench.evals.autointerp import main  # pyright: ignore[reportMissingImports]

    threshold = config.act_threshold_frac * acts.max().item()
    passages = []
    for row, column in positions:
        window = slice(column - config.buffer, column + config.buffer + 1)
        passages.append(
            main.Example(
                toks=tokens[row, window].tolist(),
                acts=acts[row, window].tolist(),
                act_threshold=threshold,
                model=model,
            )
        )
    examples = main.Examples(passages)
    if not by_strength:
        examples.examples = passages
    return examples
