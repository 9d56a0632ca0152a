"""Documents to model inputs: one token stream, cut into windows that start with `<bos>`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
SPECIAL_TOKENS = [PAD, EOS, BOS]  # the first tokens of the vocabulary: places here are token ids
PAD_ID, EOS_ID, BOS_ID = range(len(SPECIAL_TOKENS))


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Joins documents into one token stream, each as `<bos> ... <eos>`.

    Args:
        texts: documents, in the order they are joined.
        tokenizer: the tokenizer.

    Returns:
        Token ids, shape (n_tokens,), int64.
    """
    stream: list[int] = []
    for ids in tokenizer(list(texts), return_attention_mask=False)["input_ids"]:
        stream += [BOS_ID, *ids, EOS_ID]
    return torch.tensor(stream)


def windows(stream: Tensor, context: int, offset: int = 0) -> Tensor:
    """Cuts a token stream into model inputs that start with `<bos>`, and their targets.

    Args:
        stream: token ids, shape (n_tokens,).
        context: length of one model input in tokens, `<bos>` included.
        offset: first token to use; an incomplete last window is dropped.

    Returns:
        Token ids, shape (n_windows, context + 1): columns up to the last are the input, columns
        from the second on the targets.
    """
    n_windows = (len(stream) - offset) // context
    body = stream[offset : offset + n_windows * context].reshape(n_windows, context)
    bos = torch.full((n_windows, 1), BOS_ID, dtype=stream.dtype)
    return torch.cat([bos, body], dim=1)
