from __future__ import annotations

from pathlib import Path

import pytest

from saelens_matryoshka.formats.files import FormatError
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
