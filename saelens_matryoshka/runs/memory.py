"""What a training run needs in memory, by part and by what the run is doing.

The language model's parts are counted by building and running it on tensors without data; those of the
training step follow from `saelens_matryoshka.ops`, those of the activation store from
`saelens_matryoshka.store.mixing`. On a GPU the figures are those of `torch.cuda.max_memory_allocated`, plus
the CUDA context; on a CPU those of the resident memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from sae_lens import LanguageModelSAERunnerConfig
from torch._subclasses import FakeTensorMode

from saelens_matryoshka.architectures import MatryoshkaTrainingTranscoderConfig
from saelens_matryoshka.architectures.calibration import CHUNK_VALUES, MAX_ROWS, ROWS_PER_BATCH
from saelens_matryoshka.evaluation.activations import hook_activations
from saelens_matryoshka.ops import screen
from saelens_matryoshka.ops.encoder import BLOCK_VALUES
from saelens_matryoshka.ops.entries import are_dense
from saelens_matryoshka.ops.sparse import CPU_DECODE_VALUES, SPARSE_AUX
from saelens_matryoshka.parallel import Mesh
from saelens_matryoshka.runs.buffer import BufferRows, buffer_rows, rows_per_prompt
from saelens_matryoshka.runs.language_models import ModelShape
from saelens_matryoshka.runs.tracing import PeakMemory
from saelens_matryoshka.sites import check_hook
from saelens_matryoshka.store.mixing import require_buffer
from saelens_matryoshka.store.reading import hooks_of

LOADING = "loading the model"
FILLING = "reading activations"
SHUFFLING = "shuffling the buffer"
FORWARD = "step, forward"
BACKWARD = "step, backward"
SAVING = "saving"
PHASES = (LOADING, FILLING, SHUFFLING, FORWARD, BACKWARD, SAVING)
_STEP = (FORWARD, BACKWARD)
_LOADED = PHASES[1:]

BUFFER, WAITING = "activation buffer", "waiting rows as saved"
_BUFFERS = ("gradients", "pre-activations", "outputs of the levels")
CUDA_CONTEXT, PROCESS, WORKSPACES = "CUDA context", "Python and libraries", "workspaces"
# What a process takes that trains nothing yet: measured on Linux with torch 2.13. The figures of CUDA, its
# context on the GPU with cuBLAS's workspace and its libraries in main memory, are the usual ones, unmeasured.
PROCESS_BYTES = 650 << 20
# What the allocator and BLAS keep for themselves while a run goes on, as two runs on a CPU showed it.
_WORKSPACE_BYTES = 48 << 20
CUDA_CONTEXT_BYTES, CUDA_PROCESS_BYTES = 600 << 20, 1 << 30
# Share of the latents taken for dead once the run is long enough for any to be.
DEAD_SHARE = 0.1
# Bytes per kept entry: indices by row and by latent, values, the two sparse results.
_ENTRY_BYTES = 100
_FLOAT32 = 4
ALONE = Mesh()
Configs = Sequence[LanguageModelSAERunnerConfig[Any]]
"""of one run, or of several in lockstep, which share the language model and the buffer"""


class Need(NamedTuple):
    """Something that takes memory."""

    what: str
    device: str
    n_bytes: int
    phases: tuple[str, ...] = _LOADED
    """when it is there"""


class ForwardTrace(NamedTuple):
    """What one pass of the language model takes."""

    weights: int
    """bytes of parameters and buffers"""
    n_parameters: int
    peak: int
    """bytes of the activations, at their most"""
    widths: dict[str, int]
    """of the hooks, heads flattened"""


def widths_of(cfgs: Configs) -> dict[str, int]:
    """What runs read of every hook, as their settings say."""
    return {hook: getattr(cfg.sae, field) for cfg in cfgs for hook, _, field in _sites(cfg)}


def _sites(cfg: LanguageModelSAERunnerConfig[Any]) -> list[tuple[str, str, str]]:
    """Hooks with the fields that name them and their widths."""
    target = getattr(cfg.sae, "hook_name_out", None)
    source = (cfg.hook_name, "hook_name", "d_in")
    return [source, (target, "hook_name_out", "d_out")] if target else [source]


def trace_forward(cfgs: Configs, shape: ModelShape) -> ForwardTrace:
    """Count one batch of the language model, up to the last layer that is read, without computing it.

    Args:
        cfgs: Of one run, or of those in lockstep.
        shape: Of their language model.

    Raises:
        ValueError: the model has no such hook, or its width is not the dictionary's.
    """
    cfg, hooks = cfgs[0], hooks_of(cfgs)
    # Tensors on the meta device are faster than fake ones, but do not know autocast.
    device = "cpu" if cfg.autocast_lm else "meta"
    with FakeTensorMode() if cfg.autocast_lm else nullcontext():
        model = shape.build(device)
        for hook, field, _ in (site for one in cfgs for site in _sites(one)):
            check_hook(model, hook, field)
        weights = {id(t.untyped_storage()): t for t in (*model.parameters(), *model.buffers())}
        tokens = torch.zeros(cfg.store_batch_size_prompts, cfg.context_size, dtype=torch.long, device=device)
        with (
            PeakMemory() as memory,
            torch.no_grad(),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=cfg.autocast_lm),
        ):
            cache = hook_activations(model, tokens, hooks)
        shapes = {hook: cache[hook].shape for hook in hooks}
    for one in cfgs:
        _require_widths(one, shapes)
    return ForwardTrace(
        weights=sum(t.untyped_storage().nbytes() for t in weights.values()),
        n_parameters=sum(p.numel() for p in model.parameters()),
        peak=memory.peak,
        widths={hook: math.prod(shape[2:]) for hook, shape in shapes.items()},
    )


def _require_widths(cfg: LanguageModelSAERunnerConfig[Any], shapes: dict[str, torch.Size]) -> None:
    for hook, hook_field, field in _sites(cfg):
        one_head = hook_field == "hook_name" and cfg.hook_head_index is not None
        width, value = math.prod(shapes[hook][3 if one_head else 2 :]), getattr(cfg.sae, field)
        if value != width:
            raise ValueError(
                f"{field}={value}, but hook {hook!r} of {cfg.model_name!r} gives {width} values per token. "
                f"Set {field}={width}."
            )


def store_rows(cfg: LanguageModelSAERunnerConfig[Any], n_processes: int = 1) -> BufferRows:
    """Rows the activation store of one process holds."""
    return buffer_rows(
        buffer_size=cfg.n_batches_in_buffer * _per_prompt(cfg),
        llm_batch=llm_batch_rows(cfg),
        train_batch=cfg.train_batch_size_tokens // n_processes,
        mix=cfg.activations_mixing_fraction,
        wanted=cfg.training_tokens // n_processes,
    )


def require_room(cfg: LanguageModelSAERunnerConfig[Any], n_processes: int = 1) -> None:
    """Refuse a mixing buffer that could not serve one process a batch; a cache needs none.

    Raises:
        ValueError: see `saelens_matryoshka.store.mixing.require_buffer`.
    """
    if not cfg.use_cached_activations:
        require_buffer(
            cfg.n_batches_in_buffer * _per_prompt(cfg),
            cfg.train_batch_size_tokens // n_processes,
            cfg.activations_mixing_fraction,
        )


def llm_batch_rows(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    """Rows of one batch of the language model."""
    return cfg.store_batch_size_prompts * _per_prompt(cfg)


def _per_prompt(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    return rows_per_prompt(cfg.context_size, cfg.seqpos_slice)


def _is_transcoder(cfg: LanguageModelSAERunnerConfig[Any]) -> bool:
    return isinstance(cfg.sae, MatryoshkaTrainingTranscoderConfig)


def _stored_itemsize(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    """SAELens's own store of one hook holds float32 whatever the dtype."""
    size = _itemsize(cfg.dtype)
    return size if _is_transcoder(cfg) else _FLOAT32


def _itemsize(dtype: str) -> int:
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is no data type of torch: take float32 or bfloat16.")
    return found.itemsize


def device_name(device: Any) -> str:
    """cuda and cuda:0 are one device."""
    device = torch.device(device)
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type


def memory_needs(cfgs: Configs, trace: ForwardTrace, mesh: Mesh = ALONE) -> list[Need]:
    """Everything that a run holds, or several in lockstep, with when and where.

    Args:
        cfgs: Of one run, or of those in lockstep.
        trace: Of their language model.
        mesh: The processes that train together. What is counted is what one of them holds: most of it is the
            same in all, and of what only the first or only the others hold, it is the larger.
    """
    cfg, rows = cfgs[0], store_rows(cfgs[0], mesh.size)
    shares = [_share(one, mesh) for one in cfgs]
    training = _in_turn(shares, rows.refills > 1)
    if mesh.size > 1:
        training = _together(cfg, training, mesh)
    if cfg.prefetch_llm_batches:  # the buffer is filled while the steps go on
        training = [_also_while_filling(need) for need in training]
        training.append(Need(WORKSPACES, "cpu", _WORKSPACE_BYTES))  # of the thread that fills it
    store = _store(cfgs, rows, trace)
    needs = [*_language_model(cfg, trace), *store, *training]
    if mesh.size > 1:
        needs.append(_given_away(store, training))
    gpus = sorted({need.device for need in needs if need.device.startswith("cuda")})
    needs += [Need(CUDA_CONTEXT, gpu, CUDA_CONTEXT_BYTES, PHASES) for gpu in gpus]
    needs.append(Need(WORKSPACES, "cpu", _WORKSPACE_BYTES))
    needs.append(Need(PROCESS, "cpu", PROCESS_BYTES + (CUDA_PROCESS_BYTES if gpus else 0), PHASES))
    return [need for need in needs if need.n_bytes > 0]


def _share(cfg: LanguageModelSAERunnerConfig[Any], mesh: Mesh) -> LanguageModelSAERunnerConfig[Any]:
    """What one process computes in a step, as a config: its latents, on the rows of its copy."""
    share = copy.deepcopy(cfg)
    share.sae.d_sae = -(-cfg.sae.d_sae // mesh.shards)
    share.sae.k = cfg.sae.k / mesh.shards
    share.train_batch_size_tokens //= mesh.row_blocks
    share.training_tokens //= mesh.row_blocks
    return share


def _together(cfg: LanguageModelSAERunnerConfig[Any], training: list[Need], mesh: Mesh) -> list[Need]:
    """The needs of training a dictionary, where processes train it together."""
    device, size = device_name(cfg.device), _itemsize(cfg.sae.dtype)
    weights = _n_parameters(cfg) * size
    if mesh.shards == 1:
        # DDP averages the gradients in buckets of its own, which are what the optimizer then sees.
        needs = [need._replace(phases=(BACKWARD,)) if need.what == "gradients" else need for need in training]
        return [*needs, Need("buckets of gradients", device, weights)]
    # The first process saves what it has gathered in main memory, the moments too while it is a checkpoint.
    needs = [need for need in training if need.what not in ("folded copy", "file in the making")]
    largest = max(cfg.sae.d_in, getattr(cfg.sae, "d_out", 0)) * -(-cfg.sae.d_sae // mesh.shards)
    return [
        *needs,
        # to clip by the norm of all
        Need("squares of the gradients", device, largest * _FLOAT32, (BACKWARD,)),
        Need("whole dictionary and moments", "cpu", 3 * weights, (SAVING,)),
        Need("encoder, row by row", "cpu", weights // 2, (SAVING,)),
    ]


def _given_away(store: list[Need], training: list[Need]) -> Need:
    """What a process holds for the first one, which writes the checkpoint, beside what that one needs."""
    state = sum(need.n_bytes for need in store if need.what == BUFFER and SAVING in need.phases)
    files = sum(need.n_bytes for need in training if need.phases == (SAVING,) and need.device == "cpu")
    # safetensors makes the content of a file twice
    return Need("state for the first process", "cpu", max(0, 2 * state - files), (SAVING,))


def _in_turn(cfgs: Configs, refilled: bool) -> list[Need]:
    """The needs of dictionaries that take turns.

    What is kept between turns is there for each, but for buffers, which those of the same sizes share; the
    rest is there once.
    """
    by_sizes: dict[Any, list[list[Need]]] = {}
    for cfg in cfgs:
        sizes = (cfg.sae.d_in, getattr(cfg.sae, "d_out", None), cfg.sae.d_sae, cfg.sae.dtype)
        by_sizes.setdefault(sizes, []).append([*_dictionary(cfg), *_step(cfg, refilled)])
    return _added([_added(each, once=_BUFFERS) for each in by_sizes.values()])


def _added(each: Sequence[list[Need]], once: Sequence[str] = ()) -> list[Need]:
    """The needs of all: the largest of what is not kept between turns, or named in `once`, and the sum of the
    rest."""
    found: dict[tuple[Any, ...], Need] = {}
    for need in (need for needs in each for need in needs):
        key = need._replace(n_bytes=0)
        before = found[key].n_bytes if key in found else 0
        is_kept = {*_STEP, SAVING} <= set(need.phases) and need.what not in once
        n_bytes = before + need.n_bytes if is_kept else max(before, need.n_bytes)
        found[key] = need._replace(n_bytes=n_bytes)
    return list(found.values())


def _also_while_filling(need: Need) -> Need:
    if not set(_STEP) & set(need.phases):
        return need
    return need._replace(phases=tuple(dict.fromkeys((*need.phases, FILLING, SHUFFLING))))


def _language_model(cfg: LanguageModelSAERunnerConfig[Any], trace: ForwardTrace) -> list[Need]:
    device = device_name(cfg.llm_device or cfg.device)
    n_prompts = cfg.n_eval_batches * (cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts)
    # On a CPU what the thread that runs it has freed stays with the thread, and its buffers come on top.
    kept = cfg.prefetch_llm_batches and device == "cpu"
    return [
        Need("language model", device, trace.weights, PHASES),
        Need("its weights as stored", "cpu", trace.weights, (LOADING,)),
        Need("its activations", device, trace.peak, (FILLING, SHUFFLING) if kept else (FILLING,)),
        Need("held-out prompts", "cpu", max(n_prompts, 0) * cfg.context_size * 8),
    ]


def _store(cfgs: Configs, rows: BufferRows, trace: ForwardTrace) -> list[Need]:
    cfg = cfgs[0]
    device = device_name(cfg.act_store_device or cfg.device)
    if len(cfgs) == 1:
        row = (cfg.sae.d_in + (cfg.sae.d_out if _is_transcoder(cfg) else 0)) * _stored_itemsize(cfg)
        batch = 0  # it is the one that is trained on
    else:
        row = sum(trace.widths.values()) * _itemsize(cfg.dtype)
        batch = cfg.train_batch_size_tokens * row
    serving = rows.serving * row
    kept = int(cfg.n_batches_in_buffer * _per_prompt(cfg) * cfg.activations_mixing_fraction) * row
    return [
        Need(BUFFER, device, serving, (*_STEP, SAVING)),
        Need(BUFFER, device, rows.filling * row, (FILLING,)),
        Need(BUFFER, device, min(serving, rows.shuffling * row), (SHUFFLING,)),
        Need(WAITING, "cpu", max(0, serving - kept), (SAVING,)),
        Need("rows of a step", device, batch, (*_STEP, SAVING)),
        Need("its copies at a refill", device, max(0, rows.shuffling * row - serving), (SHUFFLING,)),
    ]


def _n_parameters(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    sae = cfg.sae
    d_out = sae.d_out if _is_transcoder(cfg) else sae.d_in
    skip = d_out * sae.d_in if sae.architecture() == "matryoshka_skip_transcoder" else 0
    return sae.d_sae * (sae.d_in + d_out + 1) + d_out + skip


def _dictionary(cfg: LanguageModelSAERunnerConfig[Any]) -> list[Need]:
    device, size = device_name(cfg.device), _itemsize(cfg.sae.dtype)
    weights = _n_parameters(cfg) * size
    statistics = 2 * cfg.sae.d_sae * _FLOAT32
    folded = weights if size >= _FLOAT32 else 3 * weights  # it is made in float32
    in_copy = 0 if device == "cpu" else weights  # tensors on a CPU are written from where they are
    needs = [
        Need("dictionary", device, weights),
        Need("Adam's moments", device, 2 * weights + statistics),
        Need("folded copy", device, folded, (SAVING,)),
        Need("file in the making", "cpu", in_copy, (SAVING,)),
    ]
    if getattr(cfg.sae, "threshold_calibration", None) == "l0":
        rows = min(MAX_ROWS, ROWS_PER_BATCH * cfg.total_training_steps)
        needs.append(Need("recent rows", device, rows * cfg.sae.d_in * size))
        scores = min(CHUNK_VALUES, rows * cfg.sae.d_sae) * (_FLOAT32 + 1)
        # it is over before the copy is made
        needs.append(Need("threshold calibration", device, max(0, scores - folded), (SAVING,)))
    return needs


def _step(cfg: LanguageModelSAERunnerConfig[Any], refilled: bool) -> list[Need]:
    sae, device = cfg.sae, device_name(cfg.device)
    size, on_cpu = _itemsize(sae.dtype), device_name(cfg.device) == "cpu"
    batch, d_out = cfg.train_batch_size_tokens, sae.d_out if _is_transcoder(cfg) else sae.d_in
    n_levels = len(sae.matryoshka_widths)
    # On a CPU the large buffers are kept from step to step.
    afterwards = (*((FILLING, SHUFFLING) if refilled else ()), *_STEP, SAVING)
    pre_size = 2 if cfg.autocast else size
    in_bfloat16 = max(sae.d_in, d_out) * sae.d_sae * 2 if cfg.autocast else 0  # of one matrix at a time
    values = min(batch, max(1, BLOCK_VALUES // sae.d_sae)) * sae.d_sae
    pre_activations = values * pre_size
    if _is_screened(cfg):
        values = min(batch, max(1, 2 * BLOCK_VALUES // sae.d_sae)) * sae.d_sae
        pre_activations = (values + (batch + sae.d_sae) * screen.screen_width(sae.d_in)) * 2
    decoded = batch * n_levels * d_out * size
    decoding = min(decoded, CPU_DECODE_VALUES * size) if on_cpu else 2 * decoded
    on_tensor_cores = not on_cpu and pre_size == 2
    is_matrix = on_tensor_cores and are_dense(int(sae.k * batch), batch * sae.d_sae)
    n_dead = int(DEAD_SHARE * sae.d_sae) if _may_have_dead(cfg) else 0
    copies = 3 if n_dead > SPARSE_AUX * (sae.aux_k or max(d_out // 2, 1)) else 5
    dead = n_dead * (copies * batch + 2 * (sae.d_in + d_out)) * size
    if not on_cpu or pre_size < _FLOAT32:  # else numpy compares a few rows at a time
        decoding = max(decoding, values - dead)  # the mask is gone before there is anything of the dead
    reads = batch * (sae.d_in + d_out) * size
    return [
        Need("gradients", device, _n_parameters(cfg) * size,
             afterwards if on_cpu and size >= _FLOAT32 else (BACKWARD,)),
        Need("pre-activations", device, pre_activations,
             (afterwards if not cfg.autocast else (FORWARD,)) if on_cpu else (FORWARD,)),
        Need("weights in bfloat16", device, in_bfloat16, (FORWARD,) if on_cpu else _STEP),
        Need("outputs of the levels", device, decoded, afterwards if on_cpu else _STEP),
        Need("the same in bfloat16", device, 0 if on_cpu or not cfg.autocast else decoded // 2, (BACKWARD,)),
        Need("kept entries as a matrix", device, 2 * batch * sae.d_sae if is_matrix else 0, (BACKWARD,)),
        Need("levels being decoded", device, decoding, (FORWARD,)),
        Need("batch and results", device, 2 * reads + int(sae.k * batch) * _ENTRY_BYTES, afterwards),
        Need("dead latents", device, dead, _STEP),
    ]  # fmt: skip


def _is_screened(cfg: LanguageModelSAERunnerConfig[Any]) -> bool:
    """Whether only what may be kept is computed in float32, as `screen.pays` says on this machine."""
    sae = cfg.sae
    return (
        sae.selection == "batch"
        and sae.dtype == "float32"
        and not cfg.autocast
        and screen.is_large_enough(cfg.train_batch_size_tokens, sae.d_in, sae.d_sae, sae.k)
        and screen.has_bfloat16_matrices(torch.device(cfg.device).type)
    )


def _may_have_dead(cfg: LanguageModelSAERunnerConfig[Any]) -> bool:
    return cfg.sae.aux_loss_coefficient > 0 and cfg.total_training_steps > cfg.dead_feature_window


def by_phase(needs: list[Need], device: str) -> dict[str, int]:
    """Bytes on a device while the run does each thing."""
    return {
        phase: sum(need.n_bytes for need in needs if need.device == device and phase in need.phases)
        for phase in PHASES
    }


def peak(needs: list[Need], device: str) -> int:
    """Bytes on a device at the worst of times."""
    return max(by_phase(needs, device).values())
