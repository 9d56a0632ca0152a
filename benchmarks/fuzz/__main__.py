"""Fuzz the importers: `nox -s fuzz -- --seconds 600`, or with atheris installed `python -m benchmarks.fuzz`.

libFuzzer (atheris) makes up bytes, guided by the lines of `saelens_matryoshka.formats` they reach; the bytes
decide which valid files are written and how they are damaged (`corruptions`); `harness` imports them and
checks what is promised. What breaks a promise is written to OUT, once for each place and kind, as the bytes
that repeat it: `python -m benchmarks.fuzz --repeat OUT/finding-...`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_MAX_LENGTH = 256
_ADDRESS_SPACE = 16 << 30
_RESIDENT_MB = 3000
_RANDOM_INPUTS = 200


def main() -> int:
    """Run the fuzzer in a process of its own and say what came of it; 1 if it found something."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("output/fuzz"), help="corpus and findings")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    parser.add_argument("--repeat", type=Path, nargs="+", default=None, help="try these inputs again")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.repeat:
        return _repeat(args.repeat)
    if args.child:
        _fuzz(args.out, rest)
        return 0
    return _supervise(args.seconds, args.out, args.seed, args.json)


def _supervise(seconds: int, out: Path, seed: int, json_path: Path | None) -> int:
    corpus = out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    for index in range(_RANDOM_INPUTS):
        (corpus / f"random-{index}").write_bytes(generator.randbytes(generator.randint(1, _MAX_LENGTH)))
    for finding in out.glob("finding-*"):
        finding.unlink()
    started, executions, coverage, restarts = time.monotonic(), 0, 0, 0
    while (left := seconds - (time.monotonic() - started)) > 5:
        command = [
            sys.executable, "-m", "benchmarks.fuzz", "--child", "--out", str(out), f"-seed={seed}",
            f"-max_total_time={int(left)}", f"-max_len={_MAX_LENGTH}", f"-rss_limit_mb={_RESIDENT_MB}",
            "-timeout=15", "-print_final_stats=1", f"-artifact_prefix={out}/finding-native-",
        ]  # fmt: skip
        log = out / f"log-{restarts}.txt"
        with log.open("w") as file:
            finished = subprocess.run([*command, str(corpus)], stdout=file, stderr=file, check=False)
        said = log.read_text(errors="replace")
        executions += max([int(n) for n in re.findall(r"^#(\d+)\s", said, re.MULTILINE)], default=0)
        coverage = max([coverage, *map(int, re.findall(r" cov: (\d+) ", said))])
        if finished.returncode == 0:
            break
        restarts, seed = restarts + 1, seed + 1
        print(f"the process died with {finished.returncode}: see {log}", flush=True)
        if restarts > 20:
            break
    taken = time.monotonic() - started
    findings = sorted(path for path in out.glob("finding-*") if path.suffix != ".txt")
    outcomes = _read_outcomes(out)
    print(f"{executions:,} inputs in {taken:.0f} s ({executions / taken:.0f}/s), {restarts} restarts")
    print(f"coverage: {coverage} edges of saelens_matryoshka.formats")
    print(f"corpus: {len(list(corpus.iterdir()))} inputs")
    for name, counts in sorted(outcomes.items()):
        print(f"  {name:24} {counts['imported']:>7,} imported  {counts['refused']:>7,} refused")
    for finding in findings:
        said = finding.with_suffix(".txt")
        print(f"{finding}: {said.read_text().splitlines()[0] if said.is_file() else 'crash, hang or memory'}")
    print(f"{len(findings)} findings")
    if json_path:
        figures = {"inputs": executions, "seconds": taken, "edges": coverage, "outcomes": outcomes}
        figures |= {"findings": len(findings), "restarts": restarts}
        json_path.write_text(json.dumps(figures, indent=2))
    return 1 if findings else 0


def _read_outcomes(out: Path) -> dict[str, dict[str, int]]:
    path = out / "outcomes.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _fuzz(out: Path, flags: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["saelens_matryoshka.formats"], enable_loader_override=False):
        from benchmarks.fuzz.harness import Broken, try_input
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    outcomes: dict[str, Counter[str]] = {}
    root = tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    tried = 0

    def one_input(data: bytes) -> None:
        nonlocal tried
        tried += 1
        try:
            outcome = try_input(data, Path(root.name) / "input")
            kind = "imported" if outcome.refusal is None else "refused"
            outcomes.setdefault(outcome.format, Counter(imported=0, refused=0))[kind] += 1
        except Broken as broken:
            _keep(out, data, broken)
        if tried % 200 == 0:
            (out / "outcomes.json").write_text(json.dumps(outcomes))

    atheris.Setup([sys.argv[0], *flags], one_input)
    atheris.Fuzz()


def _keep(out: Path, data: bytes, broken: Exception) -> None:
    """The input, if nothing of its kind is kept yet."""
    kind = re.sub(r"\d{2,}|'[^']*'|/\S+|\[.*?\]", "_", str(broken).splitlines()[0])[:100]
    path = out / f"finding-{hashlib.sha1(kind.encode()).hexdigest()[:8]}"
    if not path.exists():
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(f"{broken}\n")


def _repeat(paths: list[Path]) -> int:
    from benchmarks.fuzz.harness import Broken, try_input

    broken_promises = 0
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(f"{path}: {try_input(path.read_bytes(), Path(folder) / 'input')}")
            except Broken as broken:
                broken_promises += 1
                import traceback

                traceback.print_exception(broken)
    return 1 if broken_promises else 0


if __name__ == "__main__":
    sys.exit(main())
