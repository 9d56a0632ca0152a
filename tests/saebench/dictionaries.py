"""Language models, SAEs and transcoders whose SAEBench figures are known, and small data for them."""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from sae_lens import SAE
from sae_lens.registry import get_sae_class
from transformer_lens import HookedTransformer, HookedTransformerConfig

from saelens_matryoshka import tiny

SOURCE, TARGET = "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"
EMBEDDING = "blocks.0.hook_resid_pre"
CLASS_WORDS = (" import", " return", " self")
FILLERS = (" the", " of", " a", " is", " and", " for", " in", " not")


def dictionary(
    W_enc: torch.Tensor,
    W_dec: torch.Tensor,
    threshold: float | torch.Tensor = 0.0,
    *,
    hook_name: str,
    hook_name_out: str | None = None,
    b_dec: torch.Tensor | None = None,
    W_skip: torch.Tensor | None = None,
    widths: list[int] | None = None,
    **metadata: Any,
) -> SAE[Any]:
    """A stock JumpReLU SAE, transcoder or skip transcoder with these weights."""
    if hook_name_out is None:
        architecture = "jumprelu"
    else:
        architecture = "jumprelu_transcoder" if W_skip is None else "jumprelu_skip_transcoder"
    d_in, d_sae = W_enc.shape
    sae_class, cfg_class = get_sae_class(architecture)
    cfg = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "apply_b_dec_to_input": False,
        "metadata": {
            "hook_name": hook_name,
            "hook_name_out": hook_name_out,
            "model_name": "tiny",
            "context_size": 32,
            "matryoshka_widths": widths or [d_sae],
            **metadata,
        },
    }
    if hook_name_out is not None:
        cfg["d_out"] = W_dec.shape[1]
    sae = sae_class(cfg_class.from_dict(cfg))
    weights = {
        "W_enc": W_enc,
        "W_dec": W_dec,
        "b_enc": torch.zeros(d_sae),
        "b_dec": torch.zeros(W_dec.shape[1]) if b_dec is None else b_dec,
        "threshold": torch.as_tensor(threshold).expand(d_sae).clone(),
    }
    if W_skip is not None:
        weights["W_skip"] = W_skip
    sae.load_state_dict(weights)
    return sae.eval()


def random_dictionary(
    hook_name: str = SOURCE, hook_name_out: str | None = TARGET, skip: bool = False, d_sae: int = 64
) -> SAE[Any]:
    """A dictionary of the embedded model with random weights and decoder rows of many lengths."""
    generator = torch.Generator().manual_seed(0)
    random_matrix = functools.partial(torch.randn, generator=generator)
    lengths = torch.rand(d_sae, 1, generator=generator) + 0.5
    return dictionary(
        random_matrix(128, d_sae) / 11,
        lengths * random_matrix(d_sae, 128) / 40,
        1.0,
        hook_name=hook_name,
        hook_name_out=hook_name_out,
        b_dec=random_matrix(128) / 10,
        W_skip=random_matrix(128, 128) / 100 if skip else None,
        widths=[16, d_sae],
    )


def labelled_words(n_train: int = 48, n_test: int = 40) -> DatasetDict:
    """Texts whose label is the word that they repeat; the attribute is whether they are indented."""
    rng = random.Random(0)

    def rows(n: int) -> list[dict[str, str]]:
        return [
            {
                "text": ("\n   " if attribute == "indented" else "")
                + "".join(rng.sample([word] * 3 + rng.choices(FILLERS, k=6), 9)),
                "label": word.strip(),
                "attribute": attribute,
            }
            for word in CLASS_WORDS
            for attribute in ("flush", "indented")
            for _ in range(n)
        ]

    return DatasetDict(train=Dataset.from_list(rows(n_train)), test=Dataset.from_list(rows(n_test)))


def word_directions(model: HookedTransformer) -> torch.Tensor:
    """Unit embeddings of the words that are the labels, `[3, d_model]`."""
    ids = [model.to_tokens(word, prepend_bos=False)[0, 0] for word in CLASS_WORDS]
    with torch.no_grad():
        embedded = model.embed(torch.stack(ids)[None])[0]
    return embedded / embedded.norm(dim=-1, keepdim=True)


def word_detectors(model: HookedTransformer, hook_name_out: str | None = None) -> SAE[Any]:
    """Latents 0 to 2 fire on one label's word each, the others never.

    An SAE of the embedding that reconstructs their embeddings; or a transcoder of it that predicts, at
    those words, how a target differs from its mean.
    """
    directions = word_directions(model)
    with torch.no_grad():
        length = float(model.embed(model.to_tokens(CLASS_WORDS[0], prepend_bos=False)).norm())
    W_enc = torch.zeros(model.cfg.d_model, 12)
    W_enc[:, :3] = directions.T
    threshold = torch.full((12,), 1e6)
    threshold[:3] = 0.6 * length
    W_dec = torch.randn(12, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    W_dec[:3] = directions
    if hook_name_out is not None:
        texts = labelled_words()["train"]["text"]
        tokens = model.to_tokens(list(texts))
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=hook_name_out)
        target = cache[hook_name_out]
        mean = target[:, 1:].mean(dim=(0, 1))
        for j, word in enumerate(CLASS_WORDS):
            here = tokens == model.to_tokens(word, prepend_bos=False)[0, 0]
            W_dec[j] = (target[here].mean(dim=0) - mean) / length
    return dictionary(W_enc, W_dec, threshold, hook_name=EMBEDDING, hook_name_out=hook_name_out)


# ---- a language model that spells

N_ABSORBED = 4  # words a letter
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def spelling_words(tokenizer: Any, most: int = 30) -> list[str]:
    """Up to `most` words of each letter, by letter, that are one token."""
    words: dict[str, list[str]] = {letter: [] for letter in LETTERS}
    for token in sorted(tokenizer.get_vocab()):
        word = tokenizer.convert_tokens_to_string([token])
        bare = word.removeprefix(" ")
        if bare.isascii() and bare.isalpha() and len(words[bare[0].lower()]) < most:
            words[bare[0].lower()].append(word)
    return [word for letter in LETTERS for word in words[letter]]


class Speller:
    """A one-layer model whose residual at a word is its first letter, and for some words the word.

    The words of `absorbed` are those with a direction of their own, `N_ABSORBED` of each letter. The MLP
    moves all of it to other directions: `hook_mlp_out` is the residual, permuted.
    """

    def __init__(self) -> None:
        tokenizer = tiny.load_tokenizer()
        self.words = spelling_words(tokenizer)
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in self.words]
        letters = [LETTERS.index(word.strip()[0].lower()) for word in self.words]
        self.absorbed: list[tuple[int, int]] = []  # (letter, direction)
        directions: dict[int, int] = {}
        for letter in range(26):
            for position in [i for i, other in enumerate(letters) if other == letter][::7][:N_ABSORBED]:
                directions[position] = 26 + len(self.absorbed)
                self.absorbed.append((letter, directions[position]))
        self.d_model = 26 + len(self.absorbed) + 4
        cfg = HookedTransformerConfig(
            n_layers=1,
            d_model=self.d_model,
            n_ctx=256,
            d_head=8,
            n_heads=1,
            d_mlp=self.d_model,
            d_vocab=len(tokenizer),
            act_fn="relu",
            normalization_type=None,
            model_name="speller",
            seed=0,
        )
        self.model = HookedTransformer(cfg, tokenizer).eval()
        generator = torch.Generator().manual_seed(0)
        self.permutation = torch.randperm(self.d_model, generator=generator)
        embedding = torch.zeros(len(tokenizer), self.d_model)
        embedding[:, -4:] = torch.rand(len(tokenizer), 4, generator=generator)
        for position, (token, letter) in enumerate(zip(ids, letters, strict=True)):
            embedding[token, letter] = 5.0
            if position in directions:
                embedding[token, directions[position]] = 5.0
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
            self.model.W_E.copy_(embedding)
            self.model.blocks[0].mlp.W_in.copy_(torch.eye(self.d_model))
            self.model.blocks[0].mlp.W_out.copy_(torch.eye(self.d_model)[self.permutation])

    def dictionary(self, absorbs: bool, transcoder: bool) -> SAE[Any]:
        """A latent for each letter; with `absorbs`, a latent for each absorbed word fires in its place."""
        eye = torch.eye(self.d_model)
        W_enc, W_dec = eye[:26].clone(), eye[:26].clone()
        for letter, direction in self.absorbed:
            word = eye[direction][None]
            if absorbs:
                W_enc[letter] -= word[0]
                W_dec = torch.cat([W_dec, (word + eye[letter]) / 2**0.5])
            else:
                W_dec = torch.cat([W_dec, word])
            W_enc = torch.cat([W_enc, word])
        hooks = {"hook_name": "blocks.0.hook_resid_post"}
        if transcoder:
            # The MLP takes e_i to row i of W_out.
            W_dec = W_dec @ eye[self.permutation]
            hooks = {"hook_name": "blocks.0.hook_resid_mid", "hook_name_out": "blocks.0.hook_mlp_out"}
        else:
            # resid_post is the residual and the MLP's output: read and write the former.
            with torch.no_grad():
                self.model.blocks[0].mlp.W_out.zero_()
        return dictionary(W_enc.T, W_dec, 0.5, model_name="speller", **hooks)
