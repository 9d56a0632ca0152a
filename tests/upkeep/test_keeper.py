from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typing_extensions import override

from saelens_matryoshka.ops.group import Group, Over
from saelens_matryoshka.stopping import RunStopped
from saelens_matryoshka.upkeep.checkpoints import Checkpoints
from saelens_matryoshka.upkeep.keeper import Keeper


def test_a_signal_that_comes_while_processes_agree_is_heeded_by_all_after_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or this process would stop, and wait for the others in collectives that they are not in."""
    said: list[int] = []
    saved: list[int] = []

    class Others(Group):
        @override
        def count(self, n: int, over: Over) -> int:
            said.append(n)
            if len(said) == 2:  # whether a checkpoint is due, whether any is asked to stop
                keeper.stop.number = signal.SIGTERM  # the handler runs when the wait for the others is over
            return n

    monkeypatch.setattr(Checkpoints, "save", lambda _, trainer: saved.append(trainer.n_training_steps))
    keeper = Keeper(Checkpoints(tmp_path), minutes=0)
    keeper.group = Others()
    output: Any = None
    trainer: Any = SimpleNamespace(
        n_training_steps=1, n_training_samples=64, cfg=SimpleNamespace(total_training_samples=640)
    )
    keeper(trainer, output)
    assert (said, saved) == ([0, 0], [])
    trainer.n_training_steps = 2
    with pytest.raises(RunStopped, match="after step 2") as stopped:
        keeper(trainer, output)
    assert stopped.value.exit_code == 143
    assert said == [0, 0, 0, 1]
    assert saved == [2]
