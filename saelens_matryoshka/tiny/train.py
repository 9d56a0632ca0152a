"""Trains the embedded tiny language model: `python -m saelens_matryoshka.tiny.train --out DIR`.

Everything comes from the running Python's standard library, so no download is needed. The default
arguments are those of the weights that ship with the package.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from saelens_matryoshka.tiny import text
from saelens_matryoshka.tiny.card import held_out_figures, next_token_loss, write_card
from saelens_matryoshka.tiny.packing import (
    BOS,
    BOS_ID,
    EOS,
    EOS_ID,
    PAD,
    PAD_ID,
    SPECIAL_TOKENS,
    pack,
    windows,
)

WARM_UP_STEPS = 100
FINAL_LR_FRACTION = 0.05


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer.

    Args:
        texts: documents to count pairs in.
        vocab_size: number of tokens, special tokens included.

    Returns:
        A tokenizer that adds no special tokens by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        # Every byte is a token, so that no text is unknown.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def make_model(args: argparse.Namespace, vocab_size: int) -> Gemma2ForCausalLM:
    """Makes the untrained model, in float32.

    Args:
        args: the parsed command line; the sizes are read from it.
        vocab_size: number of tokens in the vocabulary.

    Returns:
        A freshly initialised model.
    """
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        query_pre_attn_scalar=args.head_dim,
        max_position_embeddings=args.context,
        # As wide as the context: the alternate "sliding" layers then see everything, and loaders
        # that treat local and global attention differently cannot disagree.
        sliding_window=args.context,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    model = Gemma2ForCausalLM(config)
    # PyTorch's fused attention leaves the soft-capping of the scores out.
    model.set_attn_implementation("eager")
    return model


def batches(stream: Tensor, args: argparse.Namespace) -> Iterator[Tensor]:
    """Yields training batches for ever.

    Each epoch cuts the stream at another offset and takes the windows in another order.

    Args:
        stream: the packed train split, shape (n_tokens,).
        args: the parsed command line (context, batch size, seed).

    Yields:
        Token ids as `windows` gives them, shape (batch_size, context + 1).

    Raises:
        ValueError: if the stream is shorter than one batch.
    """
    generator = torch.Generator().manual_seed(args.seed)
    if len(stream) < args.context * (args.batch_size + 1):
        raise ValueError(f"{len(stream)} training tokens are not enough for one batch")
    while True:
        offset = int(torch.randint(args.context, (), generator=generator))
        epoch = windows(stream, args.context, offset)
        for rows in torch.randperm(len(epoch), generator=generator).split(args.batch_size):
            if len(rows) == args.batch_size:
                yield epoch[rows]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """The learning rate of one step: linear warm-up, then a cosine down to a twentieth."""
    warm_up = min(WARM_UP_STEPS, args.steps // 10 + 1)
    if step < warm_up:
        return args.lr * (step + 1) / warm_up
    cosine = 0.5 * (1.0 + math.cos(math.pi * (step - warm_up) / max(1, args.steps - warm_up)))
    return args.lr * (FINAL_LR_FRACTION + (1.0 - FINAL_LR_FRACTION) * cosine)


def train(model: Gemma2ForCausalLM, stream: Tensor, args: argparse.Namespace) -> None:
    """Trains the model in place and prints the loss now and then.

    Args:
        model: the model, in float32.
        stream: the packed train split, shape (n_tokens,).
        args: the parsed command line.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gains = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    model.train()
    data = batches(stream, args)
    started = time.perf_counter()
    recent: list[float] = []
    for step in range(args.steps):
        batch = next(data)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, args)
        loss = next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            speed = (step + 1) * args.batch_size * args.context / (time.perf_counter() - started)
            print(
                f"step {step + 1}/{args.steps} loss {sum(recent) / len(recent):.3f} {speed:.0f} tokens/s",
                flush=True,
            )
            recent.clear()


def save(model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves model and tokenizer in the Hugging Face layout.

    Args:
        model: the trained model; its weights are rounded to float16 in place.
        tokenizer: its tokenizer.
        folder: where to write; made if missing.
    """
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors makes a file that only its owner may read; a packaged one is for everybody.
    (folder / "model.safetensors").chmod(0o644)
    # The file holds float16 to be small. The config says float32, so that loaders which follow it
    # compute in float32: half precision on a CPU is slow and would blur comparisons.
    _edit_json(folder / "config.json", dtype="float32")
    # transformers 5 writes the name of its own base class, which transformers 4 does not know.
    _edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _edit_json(path: Path, **fields: str) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m saelens_matryoshka.tiny.train",
        description="Train the embedded tiny language model on Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to save the model in")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=8, help="windows per step")
    parser.add_argument("--context", type=int, default=256, help="tokens per window")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--max-files", type=int, help="use only so many files of each split")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves, measures the saved model and writes its model card.

    Args:
        argv: command-line arguments without the program's name; `None` reads `sys.argv`.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    train_texts = text.dataset("train")["text"][: args.max_files]
    held_out_texts = text.dataset("held_out")["text"][: args.max_files]
    tokenizer = train_tokenizer(train_texts, args.vocab_size)
    stream = pack(train_texts, tokenizer)
    model = make_model(args, len(tokenizer))
    print(f"{len(stream)} training tokens, {model.num_parameters()} parameters", flush=True)

    started = time.perf_counter()
    train(model, stream, args)
    minutes = (time.perf_counter() - started) / 60
    save(model, tokenizer, args.out)

    saved = Gemma2ForCausalLM.from_pretrained(
        args.out, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    held_out = windows(pack(held_out_texts, tokenizer), args.context)
    figures = held_out_figures(saved, stream, held_out)
    tokens_seen = args.steps * args.batch_size * args.context
    write_card(
        args.out,
        saved,
        figures,
        command=f"python -m saelens_matryoshka.tiny.train {shlex.join(argv)}",
        data=(
            f"{len(train_texts)} files\n({len(stream):,} tokens) train both tokenizer and model; "
            f"{len(held_out_texts)} are held out."
        ),
        training={
            "Steps": f"{args.steps:,}, each of {args.batch_size} windows of {args.context} tokens",
            "Tokens seen": f"{tokens_seen:,} ({tokens_seen / len(stream):.1f} epochs)",
            "Optimiser": f"AdamW in float32, peak learning rate {args.lr:g}, seed {args.seed}",
            "Wall time": f"{minutes:.0f} minutes on {args.threads} CPU threads",
            "Versions": f"PyTorch {torch.__version__}, transformers {transformers.__version__}",
        },
    )
    print(f"held-out loss {figures.loss:.4f}, unigram entropy {figures.unigram_entropy:.4f}")


if __name__ == "__main__":
    main()
