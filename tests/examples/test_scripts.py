"""The examples run as they are, one after the other in one folder, as a reader would run them.

Only shorter: fewer tokens to train and to evaluate on are all that is changed.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORTER = {"training_tokens=200_000": "training_tokens=20_480", "n_tokens=20_000": "n_tokens=4_000"}
SHORTER["n_ce_tokens=4_000"] = "n_ce_tokens=1_000"
USES_ANOTHERS = ("load_and_truncate.py", "steer_and_ablate.py", "circuit_tracing.py")
PRINTED = {
    "train_sae.py": "blocks.2.hook_resid_post",
    "train_transcoder.py": "blocks.2.ln2.hook_normalized → blocks.2.hook_mlp_out",
    "train_skip_transcoder.py": "The skip alone: FVU 0.",
    "train_cross_layer.py": "blocks.1.ln2.hook_normalized → blocks.2.hook_mlp_out",
    "load_and_truncate.py": "Relative error on each token, as the prefix grows:",
    "evaluate_and_compare.py": "FVU of the first latents of each:",
    "steer_and_ablate.py": "Ablating one at a time",
    "train_many_layers.py": "FVU of every prefix, by layer:",
    "circuit_tracing.py": "layer_3.safetensors",
}
"""Every script, and something that it prints at its end. Those that use another's result come after it."""


def test_every_script_is_tested() -> None:
    assert sorted(PRINTED) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples, training on fewer tokens."""
    made = tmp_path_factory.mktemp("reader")
    (made / "examples").mkdir()
    for path in EXAMPLES.glob("*.py"):
        code = path.read_text()
        assert path.name in USES_ANOTHERS or "training_tokens=200_000" in code
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        (made / "examples" / path.name).write_text(code)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "circuit_tracer", None)  # its part is of tests/interop
    with torch.enable_grad():
        runpy.run_path(str(folder / "examples" / name), run_name="__main__")
    torch.set_grad_enabled(True)
    assert PRINTED[name] in capsys.readouterr().out
