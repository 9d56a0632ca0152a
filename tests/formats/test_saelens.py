from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from saelens_matryoshka.formats.files import FormatError, read_safetensors, safetensors_shapes
from saelens_matryoshka.formats.saelens import open_folder


def test_a_run_that_is_not_finished_is_named_as_one_with_its_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("k: 8\n")
    with pytest.raises(
        FormatError, match=r"a run that is not finished\? `train --resume` goes on with it\.$"
    ):
        open_folder(tmp_path)
    for tokens in ("8192", "11264"):
        checkpoint = tmp_path / "checkpoints" / tokens
        checkpoint.mkdir(parents=True)
        (checkpoint / "cfg.json").write_text("{}")
    with pytest.raises(FormatError, match=r"Its newest checkpoint is '.*11264'\."):
        open_folder(tmp_path)


@pytest.mark.parametrize("read", [safetensors_shapes, lambda path: read_safetensors(path, {})])
def test_weights_that_may_not_be_read_are_not_called_damaged(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors says that there is no such file. (The tests may run as root, who may read all.)"""
    path = tmp_path / "sae_weights.safetensors"
    path.touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(FormatError, match=r"sae_weights\.safetensors may not be read by this user"):
        read(path)
