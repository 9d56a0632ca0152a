"""SAELens's runner, in a run folder."""

from __future__ import annotations

from typing import Any

from sae_lens import LanguageModelSAETrainingRunner, SAETrainer
from typing_extensions import override

from saelens_matryoshka.runner import Observer, observe


class RunRunner(LanguageModelSAETrainingRunner):
    """The stock runner, whose trainer is observed."""

    observers: list[Observer]

    def __init__(self, *args: Any, observers: list[Observer] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.observers = list(observers or [])

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        for observer in self.observers:
            observe(trainer, observer)
        return super().run_trainer_with_interruption_handling(trainer)
