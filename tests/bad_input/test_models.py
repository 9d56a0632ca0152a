"""Folders of SAEs, given to the commands that read one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_input.case import Case, check_command, rows
from tests.bad_input.conftest import BROKEN

TO_ALL = [
    # folder, and what every command says of it
    ("cfg-empty", r"cfg\.json is not valid JSON"),
    ("cfg-cut", r"cfg\.json is not valid JSON"),
    ("cfg-list", r"cfg\.json holds a list, where settings by name are expected"),
    ("cfg-latin-1", r"cfg\.json is no text in UTF-8"),
    ("cfg-huge", r"cfg\.json has [\d,]+ bytes, and a config has at most"),
    ("cfg-deep", r"cfg\.json is not valid JSON"),
    ("architecture-absent", r"cfg\.json: architecture=None, where str is expected"),
    ("architecture-unknown", r"cfg\.json: architecture='sideways' is none that SAELens has"),
    ("architecture-number", r"cfg\.json: architecture=3, where str is expected"),
    ("architecture-other", r"make no model: .*threshold"),
    ("d_sae-absent", r"cfg\.json: d_sae=None, where int is expected"),
    ("d_sae-text", r"cfg\.json: d_sae='64', where int is expected"),
    ("d_sae-other", r"d_sae=65, but tensor 'W_enc' has shape \[128, 64\]"),
    ("d_sae-endless", r"d_sae=1099511627776, but tensor 'W_enc' has shape"),
    ("d_in-other", r"d_in=64, but tensor 'W_enc' has shape"),
    ("d_in-negative", r"d_in=-128, but tensor 'W_enc' has shape"),
    ("dtype-unknown", r"Invalid dtype: float12"),
    ("normalize-unknown", r"normalize_activations must be none,"),
    ("metadata-number", r"metadata=3, where settings by name are expected"),
    ("widths-misfit", r"matryoshka_widths=\[3, 7\] fits d_sae=64 in neither reading"),
    ("widths-text", r"metadata has matryoshka_widths='16,64', where list is expected"),
    ("hook-number", r"metadata has hook_name=7, where str is expected"),
    ("context-text", r"metadata has context_size='many', where int is expected"),
    ("kwargs-number", r"metadata has model_from_pretrained_kwargs=3, where dict is expected"),
    ("details-text", r"metadata has training_architecture_details='k=8', where dict is expected"),
    ("weights-empty", r"sae_weights\.safetensors is truncated or not a safetensors file"),
    ("weights-cut", r"sae_weights\.safetensors is truncated or not a safetensors file"),
    ("weights-pickle", r"sae_weights\.safetensors is truncated or not a safetensors file"),
    ("weights-nan", r"tensor 'W_enc' has NaN or infinite values"),
    ("weights-infinite", r"tensor 'b_dec' has NaN or infinite values"),
    ("weights-lack-one", r"W_dec"),
    ("weights-transposed", r"tensor 'W_dec' has shape \[128, 64\]"),
]
CASES = [
    *(Case("eval", f"{folder} --tokens 100 --json out.json", says) for folder, says in TO_ALL),
    *(Case("export", f"{folder} --to saelens --out out", says) for folder, says in TO_ALL),
    Case("import", "d_sae-endless --from saelens --out out", r"d_sae=1099511627776, but tensor 'W_enc' has"),
    Case("import", "weights-nan --from saelens --out out", r"'W_enc' has NaN or infinite values"),
    Case("hooks", "tiny --transcoder weights-cut", r"is truncated or not a safetensors file"),
    Case("hooks", "tiny --transcoder metadata-number", r"metadata=3, where settings by name are expected"),
    Case("compare", "sae weights-cut", r"is truncated or not a safetensors file"),
    # what is absent is told apart
    Case("eval", "cfg-absent", r"'cfg-absent' holds no SAE: a folder saved by SAELens has a cfg\.json"),
    Case(
        "eval", "weights-absent", r"'weights-absent' holds no weights: there is no sae_weights\.safetensors"
    ),
    Case("eval", "weights-folder", r"'weights-folder' holds no weights"),
    Case("export", "cfg-absent --to saelens --out out", r"cfg-absent holds no SAELens model \(cfg\.json and"),
    Case("export", "weights-absent --to saelens --out out", r"weights-absent holds no SAELens model"),
    Case("export", "weights-folder --to saelens --out out", r"weights-folder holds no SAELens model"),
    # whole files that do not fit the language model
    Case("eval", "hook-absent", r"metadata do not say which hook it reads\. Set sae\.cfg\.metadata"),
    Case("eval", "hook-unknown", r"hook_name='blocks\.99\.hook_resid_post' is not a hook .* did you mean"),
    Case("eval", "model-absent", r"--model is needed: this model's metadata do not say which language"),
    Case("eval", "model-unknown", r"model 'gpt-9' is not one that TransformerLens knows\. Similar: gpt2"),
    Case("eval", "context-negative", r"context_size=-3 must be from 2 to 256"),
    Case("eval", "context-long", r"context_size=1000000000 must be from 2 to 256"),
    Case(
        "eval",
        "frame-other",
        r"trained on 'blocks\.0\.hook_resid_post' in the frame 'sideways', but .* 'raw'",
    ),
    Case("eval", "narrow", r"d_in=16, but hook 'blocks\.0\.hook_resid_post' .* gives 128 .* with --model"),
    Case("export", "hook-absent --to sparsify --out out", r"nothing tells which hook it reads\. Give it:"),
    Case(
        "export",
        "narrow --to saelens --out out --calibrate-l0 --l0 4 --model tiny --tokens 100",
        r"d_in=16, but hook 'blocks\.0\.hook_resid_post' .* gives 128",
    ),
]


@rows(CASES)
def test_a_model_that_cannot_be_used_is_one_error(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    check_command(case, place, monkeypatch, capfd)


def test_every_broken_model_is_in_the_table() -> None:
    given = " ".join(case.given for case in CASES).split()
    assert not set(BROKEN) - set(given)
