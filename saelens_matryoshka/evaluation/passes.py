"""The passes that evaluations make over the same batches of tokens, one after the other."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from saelens_matryoshka.evaluation.activations import in_eval_mode
from saelens_matryoshka.evaluation.metrics import restore, state_of
from saelens_matryoshka.evaluation.tokens import require_count
from saelens_matryoshka.files.fingerprint import hash_of_tensors
from saelens_matryoshka.files.unfinished import Unfinished

if TYPE_CHECKING:
    from saelens_matryoshka.evaluation.evaluator import Evaluation

Progress = Callable[[str, int, int], None]
"""Called with what is measured, and the numbers of tokens done and to do."""


class Passes:
    """Evaluations of one language model, and how far they have come.

    Each goes over the batches once for reconstruction, then over the first of them for cross-entropy.

    Args:
        evaluations: At least one.
        batches: `[prompts, context_size]` each.
        n_ce_tokens: Tokens for cross-entropy and KL; 0 leaves them out.
    """

    def __init__(
        self, evaluations: Sequence[Evaluation], batches: Sequence[torch.Tensor], n_ce_tokens: int
    ) -> None:
        require_count("n_ce_tokens", n_ce_tokens, 0)
        self.evaluations, self.batches = evaluations, batches
        self.ce_batches = list(_first(batches, n_ce_tokens))
        self.n_done = self.n_seen = 0
        """batches and tokens, of all passes together"""

    def run(self, on_progress: Progress | None = None, unfinished: Unfinished | None = None) -> None:
        """Go through all of them, or on from the state in `unfinished`.

        Raises:
            RunStopped: SIGINT or SIGTERM has come, and the state is kept in `unfinished`.
        """
        kept = nullcontext() if unfinished is None else unfinished.kept()
        with in_eval_mode(self.evaluations[0].model), kept as keep_state:
            if unfinished is not None:
                self._go_on_with(unfinished.load())
            for what, add, tokens, done, total in itertools.islice(self._steps(), self.n_done, None):
                add(tokens)
                self.n_done += 1
                self.n_seen += tokens.numel()
                if on_progress is not None:
                    on_progress(what, done, total)
                if keep_state is not None:
                    keep_state(self)

    def _steps(self) -> Iterator[tuple[str, Callable[[torch.Tensor], None], torch.Tensor, int, int]]:
        """What is measured, how a batch is added, the batch, and tokens of the pass after it and together."""
        for evaluation in self.evaluations:
            for what, add, batches in (
                ("reconstruction", evaluation.add_reconstruction, self.batches),
                ("cross-entropy", evaluation.add_next_token, self.ce_batches),
            ):
                done, total = 0, sum(tokens.numel() for tokens in batches)
                for tokens in batches:
                    done += tokens.numel()
                    yield what, add, tokens, done, total

    def state(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on from here; of the sums no copies, of the text a hash."""
        return {
            "text": self._text,
            "done": torch.tensor([self.n_done, self.n_seen]),
            **state_of([evaluation.sums for evaluation in self.evaluations]),
        }

    def _go_on_with(self, state: dict[str, torch.Tensor] | None) -> None:
        if state is None:
            return
        if not torch.equal(state["text"], self._text):
            warnings.warn(
                "The text is not what it was when the evaluation was ended: starting anew.", stacklevel=4
            )
            return
        self.n_done, self.n_seen = state["done"].tolist()
        restore([evaluation.sums for evaluation in self.evaluations], state)

    @functools.cached_property
    def _text(self) -> torch.Tensor:
        """A hash of all tokens, and of how they are cut into prompts and batches."""
        digest = hash_of_tensors({str(index): tokens for index, tokens in enumerate(self.batches)})
        return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)


def _first(batches: Iterable[torch.Tensor], n_tokens: int) -> Iterator[torch.Tensor]:
    """Batches of the prompts with the first `n_tokens` tokens."""
    for tokens in batches:
        if n_tokens <= 0:
            return
        part = tokens[: -(-n_tokens // tokens.shape[1])]
        n_tokens -= part.numel()
        yield part
