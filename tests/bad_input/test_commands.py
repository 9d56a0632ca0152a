"""Flags and arguments of every command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_input.case import Case, check_command, rows

EXPORT = "sae --to saelens --out out"
IMPORT = "sae --from saelens --out out"
HOOKS = "tiny --transcoder transcoder --tokens 100"

CASES = [
    Case("nothing", "", r"No such command 'nothing'", 2),
    # eval and compare
    Case("eval", "", r"Missing argument '(path|PATH)'", 2),
    Case("eval", "''", r"'' is no folder\. Give a folder saved by SAELens, or RELEASE:SAE_ID"),
    Case("eval", "nowhere", r"'nowhere' is no folder\. Give a folder saved by SAELens, or RELEASE:SAE_ID"),
    Case("eval", "file", r"'file' is no folder\. Give a folder saved by SAELens"),
    Case("eval", "empty", r"'empty' holds no SAE: a folder saved by SAELens has a cfg\.json in it"),
    Case("eval", "gap", r"'gap' holds no SAE: .* Name one of those in it: layer_0, layer_2\."),
    Case("eval", "gpt2-small-res-jb:", r"'gpt2-small-res-jb:' is no folder\. Give a folder"),
    Case("eval", "gpt2-small-res-jb:none", r"ID none not found in release gpt2-small-res-jb\. Valid IDs are"),
    Case("eval", "sae --device gpu9", r"--device 'gpu9' is not one that this machine has\. Try cpu"),
    Case("eval", "sae --device meta", r"--device 'meta' is not one that this machine has\. Try cpu"),
    Case("eval", "sae --model gpt-9", r"model 'gpt-9' is not one that TransformerLens knows\. Similar: gpt2"),
    Case("eval", "sae --model ''", r"--model is needed"),
    Case("eval", "sae --tokens 0", r"'--tokens': .* (equal to |x>=)1", 2),
    Case("eval", "sae --tokens many", r"'--tokens': .* valid integer", 2),
    Case("eval", "sae --ce-tokens -1", r"'--ce-tokens': .* (equal to |x>=)0", 2),
    Case("eval", "sae --context-size 1", r"'--context-size': .* (equal to |x>=)2", 2),
    Case("eval", "sae --context-size 257", r"context_size=257 must be from 2 to 256, the longest this"),
    Case("eval", "sae --batch-size-prompts 0", r"'--batch-size-prompts': .* (equal to |x>=)1", 2),
    Case("eval", "sae --skip -1", r"'--skip': .* (equal to |x>=)0", 2),
    Case("eval", "sae --skip 100000", r"--skip 100000 leaves nothing of a text of \d+ documents"),
    Case("eval", "sae --sideways", r"No such option:? '?--sideways", 2),
    Case("eval", "sae --json=/dev/null", r"--json '/dev/null' is a device or a pipe: name a file"),
    Case("report", "sae --out /dev/null", r"--out '/dev/null' is a device or a pipe: name a file"),
    Case("eval", "sae --json=full", r"--json 'full' is a folder: name a file"),
    Case("eval", "sae --json file/x.json", r"--json 'file/x\.json' cannot be written: .*file is a file"),
    Case("eval", "sae --json=", r"--json '\.' is a folder: name a file"),
    Case("compare", "", r"Missing argument", 2),
    Case("compare", "sae transcoder", r"hook_name_out differs .* Compare models of one target"),
    Case("compare", "sae sae", r"The same model is given twice: sae, sae"),
    Case("compare", "sae ./sae/", r"The same model is given twice: sae, \./sae/"),
    Case("compare", "sae model-unknown", r"model_name differs .* name it with --model"),
    Case("compare", "sae topk --json=full", r"--json 'full' is a folder"),
    # export
    Case("export", "sae --out out", r"Missing option '--to'", 2),
    Case("export", "sae --to saelens", r"Missing option '--out'", 2),
    Case(
        "export", "nowhere --to saelens --out out", r"nowhere is not a folder: name that of a SAELens model"
    ),
    Case("export", "file --to saelens --out out", r"file is not a folder: name that of a SAELens model"),
    Case("export", "empty --to saelens --out out", r"empty holds no SAELens model \(cfg\.json and"),
    Case("export", "sae --to sideways --out out", r"There is no format 'sideways'; there are saelens, "),
    Case(
        "export", "sae --to gemma-scope --out out", r"'gemma-scope' is only read; saelens, .* can be written"
    ),
    Case("export", "sae --to circuit-tracer --out out", r"replaces MLPs by transcoders, and .* is an SAE"),
    Case("export", "sae --to sparsify --out out", r"has no thresholds, .* Give --topk K"),
    Case("export", "topk --to circuit-tracer --out out", r"is an SAE"),
    Case("export", "transcoder --to dictionary-learning --out out", r"dictionary_learning has SAEs only"),
    Case(
        "export", "gap --to circuit-tracer --out out", r"there is none of layer 1 \(only of 0, 2\)\. Give a"
    ),
    Case("export", "sae --to saelens --out full", r"--out full is not empty: name another folder"),
    Case("export", "sae --to saelens --out sae", r"--out sae is not empty: name another folder"),
    Case("export", "sae --to saelens --out .", r"--out \. is not empty: name another folder"),
    Case("export", "sae --to saelens --out file", r"--out file exists and is no folder: name another one"),
    Case("export", "sae --to saelens --out file/x", r"--out file/x cannot be made: .*file is a file"),
    Case("export", f"{EXPORT} --width 0", r"width=0 must be an integer from 1 to d_sae=64"),
    Case("export", f"{EXPORT} --width 65", r"width=65 must be an integer from 1 to d_sae=64"),
    Case("export", f"{EXPORT} --width 16 --width -4", r"width=-4 must be an integer from 1 to d_sae=64"),
    Case("export", f"{EXPORT} --width wide", r"'--width': .* valid integer", 2),
    Case("export", "topk --to saelens --out out --width 16", r"A prefix of a 'topk' model .* Convert it to"),
    Case("export", f"{EXPORT} --topk 0", r"k=0 must be in 1 \.\. d_sae=64"),
    Case("export", f"{EXPORT} --topk 65", r"k=65 must be in 1 \.\. d_sae=64"),
    Case("export", f"{EXPORT} --topk 3 --calibrate-l0", r"--topk drops .* --calibrate-l0 fits: give one"),
    Case("export", f"{EXPORT} --l0 4", r"--l0 says what --calibrate-l0 fits to: give both"),
    Case("export", f"{EXPORT} --calibrate-l0", r"--calibrate-l0 needs the language model: --model NAME"),
    Case("export", f"{EXPORT} --calibrate-l0 --model gpt-9", r"model 'gpt-9' is not one that"),
    Case("export", f"{EXPORT} --calibrate-l0 --model tiny", r"does not say its k: give .* \(--l0\)"),
    Case("export", f"{EXPORT} --calibrate-l0 --model tiny --tokens 0", r"'--tokens': .* (equal to |x>=)1", 2),
    Case("export", f"{EXPORT} --calibrate-l0 --model tiny --tokens 99 --l0 0", r"l0=0 must be larger than 0"),
    Case("export", f"{EXPORT} --calibrate-l0 --model tiny --tokens 99 --l0 nan", r"l0=nan must be larger"),
    Case("export", f"{EXPORT} --calibrate-l0 --model tiny --tokens 99 --l0 65", r"l0=65 .* at most d_sae=64"),
    Case("export", f"{EXPORT} --frame mlp_in", r"--frame needs the language model: --model NAME"),
    Case(
        "export", f"{EXPORT} --frame up --model tiny", r"There is no frame 'up'; there are normalized, mlp_in"
    ),
    Case(
        "export", f"{EXPORT} --frame mlp_in --model tiny", r"is neither ln2\.hook_normalized nor mlp\.hook_in"
    ),
    Case("export", f"{EXPORT} --upload a/b/c", r"[Rr]epo.?id must be in the form .*: 'a/b/c'"),
    Case("export", f"{EXPORT} --upload 'my repo'", r"[Rr]epo.?id must .*'my repo'"),
    # import
    Case("import", "sae --out out", r"Missing option '--from'", 2),
    Case(
        "import", "nowhere --from saelens --out out", r"'nowhere' is neither a file nor a folder here, nor a"
    ),
    Case(
        "import", "user/none --from saelens --out out", r"Cannot reach .*user/none.*: offline mode is enabled"
    ),
    Case("import", "empty --from saelens --out out", r"empty holds nothing in the format 'saelens'"),
    Case("import", "sae --from sideways --out out", r"There is no format 'sideways'; there are saelens, "),
    Case(
        "import", "sae --from sparsify --out out", r"nothing in the format 'sparsify'\. It looks like saelens"
    ),
    Case("import", "sae/cfg.json --from saelens --out out", r"cfg\.json holds .* name the folder that they"),
    Case("import", "sae --from saelens --out full", r"--out full is not empty: name another folder"),
    Case("import", "sae --from saelens --out file", r"--out file exists and is no folder: name another one"),
    Case("import", f"{IMPORT} --id none", r"has no file 'sae/none/cfg\.json'"),
    Case("import", f"{IMPORT} --id ../topk", r"path 'sae/\.\./topk' leads out of its folder; it is not read"),
    Case("import", f"{IMPORT} --widths x", r"--widths 'x' must be whole numbers, e\.g\. 64,256,1024"),
    Case("import", f"{IMPORT} --widths ''", r"--widths '' must be whole numbers, e\.g\. 64,256,1024"),
    Case("import", f"{IMPORT} --widths 16,,64", r"--widths '16,,64' must be whole numbers"),
    Case("import", f"{IMPORT} --widths 0,64", r"matryoshka_widths=\[0, 64\]: every width must be a positive"),
    Case("import", f"{IMPORT} --widths 1,2", r"matryoshka_widths=\[1, 2\] fits d_sae=64 in neither reading"),
    Case("import", f"{IMPORT} --hook-name ''", r"hook_name='' is no hook: name one"),
    Case(
        "import",
        f"{IMPORT} --hook-name 'blocks.{{laier}}.x'",
        r"\.x': \{laier\} stands for nothing; \{layer\}",
    ),
    Case(
        "import",
        "hook-absent --from saelens --out out",
        r"nothing tells which hook it reads\. Give it: .*--hook",
    ),
    Case(
        "import",
        "hook-absent --from saelens --out out --hook-name blocks.{layer}.x",
        r"hook_name='blocks\.\{layer\}\.x': the layer is not known; write its number",
    ),
    # hooks
    Case("hooks", "tiny", r"Missing option '--transcoder'", 2),
    Case(
        "hooks", "tiny --transcoder nowhere", r"'nowhere' holds no SAE: a folder saved by SAELens has a cfg"
    ),
    Case(
        "hooks", "tiny --transcoder sae", r"hook_name_out=None: only of a transcoder, .* can it be measured"
    ),
    Case("hooks", "gpt-9 --transcoder transcoder --dataset good.txt", r"model 'gpt-9' is not one that"),
    Case("hooks", f"{HOOKS} --layer 99", r"layer=99, but the model has 4 layers \(0 to 3\)"),
    Case("hooks", f"{HOOKS} --layer -1", r"layer=-1, but the model has 4 layers \(0 to 3\)"),
    Case("hooks", "tiny --transcoder transcoder --tokens 0", r"'--tokens': .* (equal to |x>=)1", 2),
    Case("hooks", f"{HOOKS} --l0 -1", r"l0=-1 must be larger than 0 and at most d_sae=64"),
    Case("hooks", f"{HOOKS} --l0 nan", r"l0=nan must be larger than 0 and at most d_sae=64"),
    # demo
    Case("demo", "extra", r"unexpected extra argument", 2),
    Case("demo", "--layer 99 --out out", r"layer=99, but the model has 4 layers \(0 to 3\)"),
    Case("demo", "--k 0 --out out", r"k=0 must be a number larger than 0 and at most d_sae"),
    Case("demo", "--k nan --out out", r"k=nan must be a number larger than 0 and at most d_sae"),
    Case("demo", "--k 2000 --out out", r"k=2000 must be a number larger than 0 and at most d_sae"),
    Case("demo", "--d-sae 0 --out out", r"d_sae=0 must be a positive integer"),
    Case("demo", "--d-sae wide --out out", r"'--d-sae': .* valid integer", 2),
    Case("demo", "--tokens 0 --out out", r"'--tokens': .* (equal to |x>=)1", 2),
    Case("demo", "--lr 0 --out out", r"--lr 0 must be a number above 0"),
    Case("demo", "--lr nan --out out", r"--lr nan must be a number above 0"),
    Case("demo", "--model gpt-9 --out out", r"model 'gpt-9' is not one that TransformerLens knows"),
    Case("demo", "--device gpu9 --out out", r"--device 'gpu9' is not one that this machine has"),
    Case("demo", "--out file", r"output_path='file' is a file: name a folder"),
    Case("demo", "--out file/x", r"output_path='file/x' cannot be made: .*file is a file"),
    Case("demo", "--out sae", r"output_path='sae' holds a model whose settings .* cannot be read\. Choose"),
]


@rows(CASES)
def test_a_wrong_argument_is_one_error(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    check_command(case, place, monkeypatch, capfd)
