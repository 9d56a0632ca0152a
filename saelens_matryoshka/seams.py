"""Everything of SAELens that is not its public interface, in one place.

Three functions of SAELens are redirected (see `saelens_matryoshka.plugin`); the rest are private functions
that have no public equivalent. Each has a contract test in `tests/test_seams.py` that says in plain words
what has moved when a release moves it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import itertools
from argparse import ArgumentError
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sae_lens import (
    SAE,
    ActivationsStore,
    JumpReLUSAE,
    JumpReLUSkipTranscoder,
    JumpReLUTranscoder,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    SAETrainer,
    SkipTranscoder,
    StandardSAE,
    Transcoder,
    llm_sae_training_runner,
)
from sae_lens import __version__ as sae_lens_version
from sae_lens.training import activations_store
from typing_extensions import override

_REDIRECTED = "_redirected_by_saelens_matryoshka"
_ENCODED_BY_THRESHOLD = (
    StandardSAE,
    Transcoder,
    SkipTranscoder,
    JumpReLUSAE,
    JumpReLUTranscoder,
    JumpReLUSkipTranscoder,
)
_split_off: WeakKeyDictionary[ActivationsStore, tuple[Any, int]] = WeakKeyDictionary()


def redirect(
    owner: type, name: str, parameters: list[str], wrap: Callable[[Callable[..., Any]], Any]
) -> None:
    """Replace `owner.name` by what `wrap` makes of it, once, if it still is what we know.

    Raises:
        ImportError: it is gone, or takes other parameters.
    """
    stock = getattr(owner, name, None)
    if getattr(stock, _REDIRECTED, False):
        return
    if stock is None or list(inspect.signature(stock).parameters) != parameters:
        raise ImportError(
            f"SAELens {sae_lens_version} has changed {owner.__name__}.{name}({', '.join(parameters)}), "
            "which saelens_matryoshka builds on. Install the sae-lens version that this release of "
            "saelens-matryoshka asks for, or a newer saelens-matryoshka."
        )
    redirected = wrap(stock)
    function = redirected.__func__ if isinstance(redirected, classmethod) else redirected
    function.__doc__ = stock.__doc__
    setattr(function, _REDIRECTED, True)
    setattr(owner, name, redirected)


def replace_progress_bar(trainer: SAETrainer[Any, Any], update: Callable[..., None]) -> None:
    """Have one trainer's progress bar updated by `update(step_output, pbar)`, called after every step."""
    trainer._update_pbar = update  # type: ignore[method-assign]


def defer_checkpoints(trainer: SAETrainer[Any, Any]) -> Callable[[], None]:
    """Keep a trainer from saving checkpoints by itself, and return what saves one if it is due.

    SAELens saves before it counts the step, so that a run resumed from there is one step behind; to be
    called after every complete step instead. It also does not pass over the thresholds that a resumed run
    has behind it, and would save at every step until it had.
    """
    save_if_due = trainer._checkpoint_if_needed
    trainer._checkpoint_if_needed = lambda: None  # type: ignore[method-assign]
    thresholds = trainer.checkpoint_thresholds
    while thresholds and thresholds[0] < trainer.n_training_samples:
        thresholds.pop(0)
    return save_if_due


def set_sae_metadata(runner: LanguageModelSAETrainingRunner) -> None:
    """Write into a runner's SAE what it is trained on, as the runner does before it trains."""
    runner._set_sae_metadata()


def token_sequences(store: ActivationsStore) -> Generator[torch.Tensor, None, None]:
    """The store's sequences of context_size tokens, from the start of its dataset, apart from its own."""
    position = store.n_dataset_processed
    try:
        yield from store._iterate_tokenized_sequences()
    finally:
        store.n_dataset_processed = position


def split_off_prompts(store: ActivationsStore, n_prompts: int, *, leaving: int) -> torch.Tensor | None:
    """Take the documents of the first prompts out of a store's dataset, in every epoch.

    Args:
        store: A store that has not been read from.
        n_prompts: How many prompts to take.
        leaving: How many prompts must be left.

    Returns:
        `[n_prompts, context_size]` on the CPU; None, and the store as it was, if there are too few.
    """
    assert store.dataset is not None
    start, n_documents = store.n_dataset_processed, 0
    taken: list[torch.Tensor] = []
    with contextlib.closing(token_sequences(store)) as sequences:
        for tokens in itertools.islice(sequences, n_prompts):
            taken.append(tokens.cpu())
            # a document is counted when the next one is asked for
            n_documents = store.n_dataset_processed - start + 1
    whole = store.dataset
    if isinstance(whole, Sized) and n_documents >= len(whole):  # a Dataset refuses to skip all it has
        return None
    store.dataset = whole.skip(n_documents)  # type: ignore[union-attr]  (a split, never a dict)
    with contextlib.closing(token_sequences(store)) as sequences:
        n_left = sum(1 for _ in itertools.islice(sequences, leaving))
    if n_left < leaving:
        store.dataset = whole
        return None
    _split_off[store] = whole, n_documents
    store.iterable_sequences = store._iterate_tokenized_sequences()
    return torch.stack(taken)


def before_split_off(store: ActivationsStore) -> tuple[Any, int]:
    """A store's dataset before `split_off_prompts`, and how many documents that took from its beginning."""
    return _split_off.get(store, (store.dataset, 0))


def read_from(store: ActivationsStore, dataset: Any) -> None:
    """Have a store that has not been read from read another dataset."""
    store.dataset = dataset
    store.iterable_sequences = store._iterate_tokenized_sequences()


@contextlib.contextmanager
def replacing_load_trainer_state(load: Callable[..., None]) -> Generator[None, None, None]:
    """Within, `load(stock, trainer, checkpoint_path)` loads the state of a trainer that a runner resumes.

    A runner makes its trainer and loads its state in one go, so that there is no trainer to change before.
    """
    stock = SAETrainer.load_trainer_state

    def load_trainer_state(self: SAETrainer[Any, Any], checkpoint_path: Any) -> None:
        load(stock, self, checkpoint_path)

    SAETrainer.load_trainer_state = load_trainer_state  # type: ignore[method-assign]
    try:
        yield
    finally:
        SAETrainer.load_trainer_state = stock  # type: ignore[method-assign]


class OpenStore(ActivationsStore):
    """SAELens's store with a name for each private part that a place in its data is made of.

    Its sequences are those that `sequences` gives, at the start of every epoch.
    """

    def sequences(self) -> Iterator[torch.Tensor]:
        """Sequences of context_size tokens, from the start of the dataset."""
        return super()._iterate_tokenized_sequences()

    @override
    def _iterate_tokenized_sequences(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
        return self.sequences()

    def sequences_of(self, rows: Iterable[Any]) -> Iterator[torch.Tensor]:
        """Sequences of context_size tokens cut from these rows in place of the dataset's."""
        return ActivationsStore._iterate_tokenized_sequences(_reading(self, rows))

    def tokens_of(self, rows: Iterable[Any]) -> Iterator[torch.Tensor]:
        """The tokens of each of these rows, which hold text."""
        return _reading(self, rows)._iterate_raw_dataset_tokens()

    def filtered_activations(self) -> Iterator[torch.Tensor]:
        """Rows `[n, d_in]` of one batch of the language model after the other, over all epochs."""
        return self._iterate_filtered_activations()


def _reading(store: OpenStore, rows: Iterable[Any]) -> OpenStore:
    """The store, reading other rows, and counting them apart."""
    reader = copy.copy(store)
    reader.dataset = rows  # type: ignore[assignment]
    return reader


def firing_thresholds(sae: SAE[Any]) -> torch.Tensor | None:
    """`[d_sae]` the thresholds of a stock ReLU or JumpReLU model, never below 0; None of any other.

    Above its threshold a latent's activation is its entry of `process_sae_in(x) @ W_enc + b_enc`, and not
    above it 0.
    """
    if type(sae) not in _ENCODED_BY_THRESHOLD or not isinstance(sae.activation_fn, torch.nn.ReLU):
        return None
    threshold: Any = getattr(sae, "threshold", None)
    if threshold is None:
        return torch.zeros(int(sae.cfg.d_sae), dtype=sae.dtype, device=sae.device)
    return threshold.detach().clamp(min=0)


def token_device(model: Any) -> torch.device:
    """The device a language model takes its tokens on."""
    return activations_store._get_input_token_device(model)


def parse_runner_config(args: Sequence[str]) -> LanguageModelSAERunnerConfig[Any]:
    """SAELens's command-line flags as a runner config; `--help` prints them and exits.

    Raises:
        ValueError: a flag is unknown, or its value is refused.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return llm_sae_training_runner._parse_cfg_args(args)
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # argparse has written the usage of some hundred flags, and then what is wrong
        raise ValueError(said.getvalue().rpartition("error: ")[2].strip()) from None
