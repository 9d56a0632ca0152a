"""One eval of one prefix: SAEBench is run on it, and its result is kept with all that it depends on.

1. The prefix becomes a stock model of its own, with decoder rows of norm 1, as SAEBench makes of those
   that it loads itself; a transcoder's is shown through a view (`views`).
2. SAEBench runs under the patches (`patches`); its file is kept as it is.
3. Our file beside it holds the metrics, the L0 they were had at, and a fingerprint of all they depend on.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens import SAE
from transformer_lens import HookedTransformer

from saelens_matryoshka.files.atomic import write_atomically
from saelens_matryoshka.files.fingerprint import hash_of, hash_of_file, hash_of_tensors
from saelens_matryoshka.files.valid_json import dumps
from saelens_matryoshka.prefixes import inference_model, truncate
from saelens_matryoshka.saebench import evals as _evals
from saelens_matryoshka.saebench import patches
from saelens_matryoshka.saebench.data import LabelledText
from saelens_matryoshka.saebench.process import complete_cache
from saelens_matryoshka.saebench.requirements import VERSION
from saelens_matryoshka.saebench.result import PrefixEval
from saelens_matryoshka.saebench.views import (
    HookAlias,
    PairView,
    is_transcoder,
    layer_of,
    output_view,
    pair_view,
)


class Bench:
    """SAEBench for the prefixes of one SAE or transcoder, on one language model."""

    def __init__(
        self,
        sae: SAE[Any],
        model: HookedTransformer,
        out: Path,
        *,
        scratch: Path,
        cache: Path,
        labelled: LabelledText | None,
        seed: int,
        llm_batch_size: int,
    ) -> None:
        self.sae, self.model, self.out = sae, model, out
        self.scratch, self.cache = scratch, cache
        self.labelled, self.seed, self.llm_batch_size = labelled, seed, llm_batch_size
        self.model_name = str(sae.cfg.metadata.model_name or model.cfg.model_name)
        self.dtype = str(model.cfg.dtype).removeprefix("torch.")

    # ---- what a result depends on

    @cached_property
    def _labelled_fingerprint(self) -> str | None:
        return None if self.labelled is None else self.labelled.fingerprint()

    @cached_property
    def _common(self) -> dict[str, Any]:
        """What the result of every eval depends on, but for the SAE's weights."""
        metadata = self.sae.cfg.metadata
        return {
            "model": hash_of_tensors(self.model.state_dict()),
            "hooks": [metadata.hook_name, metadata.hook_name_out],
            "seed": self.seed,
            "sae_bench": VERSION,
        }

    @cached_property
    def _sae_fingerprint(self) -> str:
        return hash_of([self.sae.cfg.architecture(), hash_of_tensors(self.sae.state_dict())])

    @cached_property
    def _subject(self) -> str:
        """Hash of what all evals have in common: results of the same subject make one table."""
        return hash_of({**self._common, "sae": self._sae_fingerprint})

    def _language_model_fingerprint(self, item: _evals.Eval, options: Mapping[str, Any]) -> str:
        """Hash of all that what is computed without latents depends on."""
        labelled = self._labelled_fingerprint if item.labelled else None
        settings = {name: options[name] for name in item.without_latents}
        return hash_of({**self._common, "eval": item.name, "labelled": labelled, "settings": settings})

    def _fingerprint(self, item: _evals.Eval, width: int, options: Mapping[str, Any]) -> str:
        return hash_of(
            {
                **self._common,
                "eval": item.name,
                "width": width,
                "sae": self._sae_fingerprint,
                "labelled": self._labelled_fingerprint if item.labelled else None,
                "settings": _with_contents(options),
            }
        )

    # ---- results on disk

    def _file(self, item: _evals.Eval, width: int, suffix: str) -> Path:
        return self.out / f"width-{width}" / f"{item.name}{suffix}"

    def finished(
        self, item: _evals.Eval, width: int, options: Mapping[str, Any]
    ) -> PrefixEval | Literal["other"] | None:
        """The result that is there; "other" if it is of other settings, None if there is none."""
        path = self._file(item, width, ".json")
        if not path.exists():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["fingerprint"] != self._fingerprint(item, width, options):
            return "other"
        return PrefixEval.from_dict(record)

    def kept(self) -> list[PrefixEval]:
        """Every result that is there of this SAE, language model and seed, each with settings of its own."""
        files = [path for name in _evals.EVALS for path in self.out.glob(f"width-*/{name}.json")]
        records = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        return [PrefixEval.from_dict(one) for one in records if one.get("subject") == self._subject]

    # ---- evaluation

    def run(self, item: _evals.Eval, width: int, options: Mapping[str, Any]) -> PrefixEval:
        """Evaluate one prefix, and save the result.

        Raises:
            RuntimeError: SAEBench gave no result; its output is in the log that the message names.
        """
        log = self._file(item, width, ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        space = "output" if is_transcoder(self.sae) else "input"
        started = time.monotonic()
        if width < item.min_width:
            reason = f"{item.name} needs {item.min_width} latents"
            result = PrefixEval(item.name, width, space, None, {}, skipped=reason)
        else:
            try:
                with log.open("w", encoding="utf-8") as stream, _output_to(stream):
                    l0, metrics = self._bench(item, width, options)
                result = PrefixEval(item.name, width, space, l0, metrics)
            except patches.Unsuitable as error:
                result = PrefixEval(item.name, width, space, None, {}, skipped=str(error))
            except Exception as error:
                raise RuntimeError(f"{_reason(error, log)}\n    (see {log})") from error
        record = {
            **result.to_dict(),
            "model_name": self.model_name,
            "hook_name": self.sae.cfg.metadata.hook_name,
            "hook_name_out": self.sae.cfg.metadata.hook_name_out,
            "settings": _with_contents(options),
            "seed": self.seed,
            "seconds": round(time.monotonic() - started, 1),
            "sae_bench": VERSION,
            "subject": self._subject,
            "fingerprint": self._fingerprint(item, width, options),
        }
        write_atomically(self._file(item, width, ".json"), dumps(record, indent=2))
        return result

    def _bench(
        self, item: _evals.Eval, width: int, options: Mapping[str, Any]
    ) -> tuple[float, dict[str, float | None]]:
        scratch = self.scratch / f"{item.name}-{width}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        # A name of its own: SAEBench calls every object "custom_sae" and skips a name that it has seen.
        name = f"width-{width}-{self._fingerprint(item, width, options)[:12]}"
        prefix = self._prefix(width)
        counter = _ActiveLatents(prefix)
        with ExitStack() as stack:
            sae: Any = prefix
            if is_transcoder(prefix):
                view = output_view if item.name == "core" else pair_view
                sae = stack.enter_context(view(self.model, prefix))
            key = f"{item.name}-{self._language_model_fingerprint(item, options)[:16]}"
            cache = stack.enter_context(complete_cache(self.cache / key))
            shutil.rmtree(cache / f"{name}_custom_sae", ignore_errors=True)
            job = patches.Job(
                eval_name=item.name,
                options=options,
                model=self._model_for(item, sae),
                cache=cache,
                scratch=scratch,
                seed=self.seed,
                pair=sae if isinstance(sae, PairView) else None,
                labelled=self.labelled if item.labelled else None,
                llm_batch_size=self.llm_batch_size,
            )
            stack.enter_context(patches.patched(job))
            found = _evals.call(
                item,
                sae,
                name,
                options,
                model_name=self.model_name.replace("/", "-"),
                seed=self.seed,
                dtype=self.dtype,
                device=str(self.model.cfg.device),
                cache=cache,
                results=scratch / "results",
            )
            if found is None:
                raise RuntimeError("SAEBench gave no result")
        path, metrics = found
        shutil.copyfile(path, self._file(item, width, ".saebench.json"))
        shutil.rmtree(scratch, ignore_errors=True)
        if item.name == "core":
            metrics["saebench_explained_variance"] = metrics["explained_variance"]
            metrics["explained_variance"] = job.explained_variance.compute()
        return (metrics["l0"] if item.name == "core" else counter.l0()) or 0.0, _finite(metrics)

    def _prefix(self, width: int) -> SAE[Any]:
        """A stock model of the first `width` latents, on the language model's device, in its dtype."""
        sae = inference_model(self.sae)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a width that was asked for
            sae = copy_of(sae) if width == sae.cfg.d_sae else truncate(sae, width)
        sae.to(device=self.model.cfg.device, dtype=self.model.cfg.dtype)
        normalize_decoder(sae)
        metadata = sae.cfg.metadata
        metadata.model_name = self.model_name
        metadata.hook_layer = layer_of(metadata.hook_name)
        if metadata.prepend_bos is None:
            metadata.prepend_bos = bool(self.model.cfg.default_prepend_bos)
        return sae

    def _model_for(self, item: _evals.Eval, sae: Any) -> Any:
        """The language model; for absorption with the hook that it reads answered by the SAE's."""
        if item.name != "absorption":
            return self.model
        hook_name = sae.cfg.metadata.hook_name
        alias = f"blocks.{sae.cfg.metadata.hook_layer}.hook_resid_post"
        return HookAlias(self.model, alias, hook_name, sae.cfg.d_in)


@torch.no_grad()
def normalize_decoder(sae: SAE[Any]) -> None:
    """Make the decoder's rows unit vectors, in place; what the model computes stays the same.

    Absorption multiplies activations with cosines, as if they were projections, and probes are sensitive
    to the latents' scale; SAEBench folds the norms of what it loads from SAELens. (Not SAELens's own
    `fold_W_dec_norm`: that of its JumpReLU transcoders leaves the thresholds as they are.)
    """
    if sae.cfg.architecture() == "gated":
        sae.fold_W_dec_norm()
        return
    if not hasattr(sae, "b_enc") or "topk" in sae.cfg.architecture():
        return
    norms = sae.W_dec.norm(dim=-1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    sae.W_dec.div_(norms[:, None])
    sae.W_enc.mul_(norms)
    for name in ("b_enc", "threshold"):
        if hasattr(sae, name):
            getattr(sae, name).mul_(norms)


def copy_of(sae: SAE[Any]) -> SAE[Any]:
    """A model that shares no memory with `sae`."""
    with torch.random.fork_rng():  # its weights are drawn only to be replaced
        copied = type(sae)(type(sae.cfg).from_dict(sae.cfg.to_dict()))
    copied.load_state_dict(sae.state_dict())
    return copied.eval()


class _ActiveLatents:
    """Counts the active latents of whatever the SAE encodes, where its input is not zeroed."""

    def __init__(self, sae: SAE[Any]) -> None:
        self._sum, self._rows = 0, 0
        self._counted: torch.Tensor | None = None
        sae.hook_sae_input.add_hook(self._see_input)
        sae.hook_sae_acts_post.add_hook(self._see_acts)

    def _see_input(self, tensor: torch.Tensor, *, hook: Any) -> None:  # noqa: ARG002
        self._counted = tensor.ne(0).any(dim=-1)

    def _see_acts(self, tensor: torch.Tensor, *, hook: Any) -> None:  # noqa: ARG002
        assert self._counted is not None
        self._sum += int(tensor.ne(0).sum(dim=-1)[self._counted].sum())
        self._rows += int(self._counted.sum())

    def l0(self) -> float:
        """Active latents per encoded activation."""
        return self._sum / max(self._rows, 1)


@contextmanager
def _output_to(stream: Any) -> Iterator[None]:
    """What SAEBench prints, shows as progress and logs goes to the stream."""
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("sae_bench")
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    datasets_logger = logging.getLogger("datasets")
    level = datasets_logger.level
    datasets_logger.setLevel(logging.CRITICAL)  # SAEBench passes it an argument that it complains of
    try:
        with redirect_stdout(stream), redirect_stderr(stream), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        datasets_logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(handler)


def _reason(error: Exception, log: Path) -> str:
    """The error, with what SAEBench said last."""
    marks = ("Failed to evaluate", "Cannot evaluate", "Failed to load")
    lines = log.read_text(encoding="utf-8").splitlines()
    said = [line[line.index(mark) :] for line in lines for mark in marks if mark in line]
    reason = ": ".join([str(error) or type(error).__name__, *said[-1:]])
    if "Dataset scripts are no longer supported" in reason:
        reason += (
            "\n    This dataset has a loading script, which datasets 4 and later refuse: give local text, "
            'name other datasets, or install "datasets<4".'
        )
    return reason


def _finite(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers only; None for what is not one."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    return {name: float(value) if math.isfinite(value) else None for name, value in numbers.items()}


def _with_contents(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with the hash of a local text in place of its folder."""
    settings = dict(options)
    path = Path(str(settings.get("dataset", "")), "train.jsonl")
    if path.exists():
        settings["dataset"] = hash_of_file(path)
    return settings
