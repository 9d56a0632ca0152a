"""Describe latents in words with a chat model, and score the descriptions by detection.

SAEBench's autointerp words the prompts and reads the answers. The chat model sees where a latent fires and
describes it; then, given its description only, it says in which of some unmarked passages the latent fires.
How often it is right is the score.

1. Latents that fire often enough are chosen, the same number from each level.
2. Examples of all of them are collected in one pass of the language model over the text.
3. What it will take is estimated; nothing is sent before that is approved.
4. Each latent's description and score are written down as they come, by one process at a time, so an
   interrupted run goes on where it stopped, and nothing is asked for twice.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from sae_lens import SAE

from saelens_matryoshka.evaluation.activations import hook_activations
from saelens_matryoshka.evaluation.evaluator import hooks_and_frame
from saelens_matryoshka.evaluation.metrics import FiringCounts
from saelens_matryoshka.evaluation.tokens import is_excluded, special_token_ids, token_batches
from saelens_matryoshka.files.fingerprint import hash_of_tensors
from saelens_matryoshka.files.locks import alone_at
from saelens_matryoshka.prefixes import inference_model, matryoshka_widths
from saelens_matryoshka.saebench.descriptions import Description, Descriptions
from saelens_matryoshka.saebench.endpoint import ChatModel, Endpoint, Estimate
from saelens_matryoshka.saebench.examples import Examples, activations, examples_of
from saelens_matryoshka.saebench.requirements import require_sae_bench

_GRACE_SECONDS = 10.0
"""for which the answers under way are waited for when it is interrupted"""

# Its tokens are counted in place of those of a description, before there is one.
_WORDS = (
    "some words that stand for a description of the latent, which has at most twenty of them by the prompt"
)


def describe(
    sae: SAE[Any],
    model: Any,
    text: Any,
    out: str | Path,
    *,
    endpoint: Endpoint,
    n_latents: int = 100,
    latents: Sequence[int] | None = None,
    n_tokens: int = 1_000_000,
    context_size: int = 128,
    batch_size_prompts: int = 32,
    min_firings: int = 50,
    concurrency: int = 8,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    approve: Callable[[Estimate], bool] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Descriptions:
    """Descriptions of latents, with their detection scores.

    Args:
        sae: SAE or transcoder, ours or stock.
        model: HookedTransformer, as the SAE was trained on it.
        text: Text to take examples from: what `sm.evaluate` takes as its dataset.
        out: Folder of the results: `settings.json`, and `latents.jsonl` with a line per latent, written as
            they come.
        endpoint: The chat model. Its key is read from the environment.
        n_latents: How many, chosen at random, the same number from each level as far as there are.
        latents: Which, in place of `n_latents`.
        n_tokens: Tokens the examples are taken from.
        context_size: Tokens per prompt.
        batch_size_prompts: Prompts per forward pass of the language model.
        min_firings: Tokens a latent must fire on to be chosen.
        concurrency: Requests at a time.
        seed: Of the choice of latents and examples.
        settings: Of SAEBench's autointerp, where they are not to be its defaults, e.g.
            `{"n_random_ex_for_scoring": 10}`.
        approve: Called with the estimate before anything is sent; nothing is if it returns False.
        on_progress: Called with the numbers of latents done and to do.

    Raises:
        ImportError: SAEBench is not installed.
        ValueError: an argument is not possible, or `out` has descriptions that were made otherwise.
        EndpointError: the endpoint refuses all requests.
        RuntimeError: some requests failed after all retries; all others are written down.
    """
    require_sae_bench()
    sae = inference_model(sae)
    hooks_and_frame(sae, model)
    tokens = torch.cat(list(token_batches(sae, model, text, n_tokens, context_size, batch_size_prompts)))
    config = _config(settings or {}, tokens, batch_size_prompts, seed)
    firings = _firings(sae, model, tokens, batch_size_prompts)
    chosen = _choose(sae, firings, n_latents, latents, min_firings, seed)
    made_with = {
        "chat_model": endpoint.model,
        "model": hash_of_tensors(sae.state_dict()),
        "tokens": hash_of_tensors({"tokens": tokens}),
        "seed": seed,
        "settings": dict(settings or {}),
    }
    widths = matryoshka_widths(sae)
    said = Descriptions.open(out, made_with, widths)
    if set(chosen) <= set(said.by_latent):
        return said
    in_use = ValueError(
        f"out={str(out)!r} is in use: another process is writing descriptions there. Wait for it, or choose "
        "another folder."
    )
    with _seeded(seed):
        interp = _autointerp(config, model, tokens)
        todo = [latent for latent in chosen if latent not in said.by_latent]
        examples = _examples(config, sae, model, tokens, todo, batch_size_prompts, seed)
        estimate = _estimate(interp, examples, model)
        if approve is not None and not approve(estimate):
            return said
        chat = ChatModel(endpoint)
        with alone_at(Path(out), in_use):
            said = Descriptions.open(out, made_with, widths)  # with what another process has added since
            missing = {latent: parts for latent, parts in examples.items() if latent not in said.by_latent}
            _ask(interp, chat, missing, said, concurrency, on_progress)
    return said


def _ask(
    interp: Any,
    chat: ChatModel,
    examples: Mapping[int, Examples],
    said: Descriptions,
    concurrency: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    from openai import OpenAIError  # pyright: ignore[reportMissingImports]

    waiting: SimpleQueue[tuple[int, Examples]] = SimpleQueue()
    for item in examples.items():
        waiting.put(item)
    ended: SimpleQueue[tuple[int, Exception | None]] = SimpleQueue()
    stopped = Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                latent, parts = waiting.get_nowait()
            except Empty:
                return
            try:
                # Written down here: what is under way when the call is interrupted is paid for, and kept too.
                said.add(_describe_one(interp, chat, latent, *parts))
                ended.put((latent, None))
            except Exception as error:
                ended.put((latent, error))

    failed: list[str] = []
    # Daemons, unlike an executor's: a request that is not answered does not keep the process from ending.
    threads = [Thread(target=work, daemon=True) for _ in range(min(concurrency, len(examples)))]
    for thread in threads:
        thread.start()
    try:
        for n_done in range(1, len(examples) + 1):
            latent, error = ended.get()
            if isinstance(error, OpenAIError):
                failed.append(f"latent {latent}: {error}")
            elif error is not None:
                raise error
            if on_progress is not None:
                on_progress(n_done, len(examples))
    finally:
        stopped.set()
        until = time.monotonic() + _GRACE_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
    if failed:
        others = f"The others are in {said.folder}; the" if said.by_latent else "The"
        raise RuntimeError(
            f"{len(failed)} of {len(examples)} latents got no answer ({failed[0]}). {others} same call again "
            "asks for these only."
        )


def _describe_one(interp: Any, chat: ChatModel, latent: int, generation: Any, scoring: Any) -> Description:
    cfg = interp.cfg
    answer = chat.answer(interp.get_generation_prompts(generation), cfg.max_tokens_in_explanation)
    text = interp.parse_explanation(answer)
    fires = [example.is_active for example in scoring]
    detected: list[bool] | None = None
    answer = chat.answer(interp.get_scoring_prompts(text, scoring), cfg.max_tokens_in_prediction)
    predictions = interp.parse_predictions(answer)
    if predictions is not None:
        detected = [number in predictions for number in range(1, len(fires) + 1)]
    return Description(latent=latent, text=text, fires=fires, detected=detected)


def _estimate(interp: Any, examples: Mapping[int, Examples], model: Any) -> Estimate:
    n_tokens = 0
    for generation, scoring in examples.values():
        for messages in (
            interp.get_generation_prompts(generation),
            interp.get_scoring_prompts(_WORDS, scoring),
        ):
            words = "\n".join(message["content"] for message in messages)
            n_tokens += len(model.tokenizer(words, add_special_tokens=False)["input_ids"])
    answers = interp.cfg.max_tokens_in_explanation + interp.cfg.max_tokens_in_prediction
    return Estimate(len(examples), 2 * len(examples), n_tokens, answers * len(examples))


# ---- examples


def _examples(
    config: Any,
    sae: SAE[Any],
    model: Any,
    tokens: torch.Tensor,
    latents: list[int],
    batch_size: int,
    seed: int,
) -> dict[int, Examples]:
    """By latent, without those that fire in too few passages."""
    found: dict[int, Examples] = {}
    for latent, acts in zip(latents, activations(sae, model, tokens, latents, batch_size), strict=True):
        # A generator each, so that the passages do not depend on which latents are done already.
        generator = torch.Generator().manual_seed(1_000_003 * seed + latent)
        examples = examples_of(acts, tokens, model, config, generator)
        if examples is not None:
            found[latent] = examples
    if len(found) < len(latents):
        warnings.warn(
            f"{len(latents) - len(found)} of {len(latents)} latents fire in fewer than {config.n_top_ex} "
            "separate passages of this text and are left out. Give more tokens.",
            stacklevel=3,
        )
    return found


def _config(settings: Mapping[str, Any], tokens: torch.Tensor, batch_size: int, seed: int) -> Any:
    from pydantic import ValidationError
    from sae_bench.evals.autointerp.eval_config import AutoInterpEvalConfig  # pyright: ignore[reportMissingImports]

    known = set(AutoInterpEvalConfig.__dataclass_fields__)
    if unknown := set(settings) - known:
        raise ValueError(
            f"settings: {', '.join(sorted(unknown))}: autointerp knows {', '.join(sorted(known))}."
        )
    try:
        config = AutoInterpEvalConfig(
            **{
                "random_seed": seed,
                "llm_context_size": tokens.shape[1],
                "llm_batch_size": batch_size,
                "total_tokens": tokens.numel(),
                **settings,
            }
        )
    except ValidationError as error:
        raise ValueError(f"settings: {error}") from None
    if 2 * config.buffer + 1 > tokens.shape[1]:
        raise ValueError(
            f"context_size={tokens.shape[1]} is too short for examples of {config.buffer} tokens to each "
            "side: raise it, or lower settings['buffer']."
        )
    return config


@torch.no_grad()
def _firings(sae: SAE[Any], model: Any, tokens: torch.Tensor, batch_size: int) -> torch.Tensor:
    """On how many tokens, special ones aside, each latent fires: `[d_sae]`."""
    counts = FiringCounts(sae.cfg.d_sae, torch.device(sae.device))
    special = special_token_ids(model, True)
    name = sae.cfg.metadata.hook_name
    for batch in tokens.split(batch_size):
        acts = sae.encode(hook_activations(model, batch, [name])[name].to(sae.device))
        counts.add(acts[~is_excluded(batch, special).to(acts.device)])
    return counts.fired.cpu()


def _choose(
    sae: SAE[Any],
    firings: torch.Tensor,
    n_latents: int,
    latents: Sequence[int] | None,
    min_firings: int,
    seed: int,
) -> list[int]:
    if latents is not None:
        outside = [latent for latent in latents if not 0 <= latent < sae.cfg.d_sae]
        if outside or not latents:
            raise ValueError(f"latents={list(latents)}: expected numbers from 0 to {sae.cfg.d_sae - 1}.")
        return sorted(set(latents))
    if n_latents < 1:
        raise ValueError(f"n_latents={n_latents} must be at least 1.")
    rng, lower, levels = random.Random(seed), 0, []
    for width in matryoshka_widths(sae):
        alive = [latent for latent in range(lower, width) if firings[latent] >= min_firings]
        rng.shuffle(alive)
        levels.append(alive)
        lower = width
    in_turn = [latent for rank in zip_longest(*levels) for latent in rank if latent is not None]
    if not in_turn:
        raise ValueError(
            f"min_firings={min_firings}: no latent fires on so many of these tokens. Give more tokens, or "
            "lower it."
        )
    return sorted(in_turn[:n_latents])


def _autointerp(config: Any, model: Any, tokens: torch.Tensor) -> Any:
    """SAEBench's, for its prompts and its reading of the answers."""
    from sae_bench.evals.autointerp import main  # pyright: ignore[reportMissingImports]

    return main.AutoInterp(
        cfg=config,
        model=model,
        sae=None,  # type: ignore[arg-type]
        tokenized_dataset=tokens,
        sparsity=torch.zeros(0),
        device=str(tokens.device),
        api_key="",
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Examples drawn from `seed`; the process's random state is as before afterwards."""
    state = random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
