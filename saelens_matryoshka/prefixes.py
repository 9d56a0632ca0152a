"""The prefixes of a nested dictionary, as stock SAELens objects.

Everything here works on trained, loaded and published models alike: a prefix needs nothing but the
weights, as long as the activation of a latent does not depend on the other latents (JumpReLU, ReLU).
"""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE, Transcoder
from sae_lens.registry import get_sae_class

from saelens_matryoshka.architectures import MatryoshkaTraining, MatryoshkaTrainingTranscoder
from saelens_matryoshka.ops import ALONE, Group, nested_decode
from saelens_matryoshka.scaling import SCALED
from saelens_matryoshka.sites import uncompiled
from saelens_matryoshka.widths import cumulative_widths, plain_numbers

# The dimension of each tensor that runs over the latents.
_LATENT_DIM = {
    "W_enc": 1,
    "b_enc": 0,
    "threshold": 0,
    "W_dec": 0,
    "b_gate": 0,
    "r_mag": 0,
    "b_mag": 0,
}
_PER_LATENT_ARCHITECTURES = frozenset(
    {
        "standard",
        "jumprelu",
        "gated",
        "transcoder",
        "skip_transcoder",
        "jumprelu_transcoder",
        "jumprelu_skip_transcoder",
    }
)


def matryoshka_widths(sae: SAE[Any]) -> list[int]:
    """Cumulative widths of the nested levels an SAE or transcoder was trained with.

    They are read from the config of a training SAE, and else from the metadata, where this package and
    SAELens's `matryoshka_batchtopk` record them. `[d_sae]` if none are known: then the model has one
    prefix, itself.

    Raises:
        ValueError: `sae` is no SAE or transcoder.
    """
    _require_sae(sae)
    metadata = sae.cfg.metadata
    details = metadata.get("training_architecture_details") or {}
    recorded = (
        getattr(sae.cfg, "matryoshka_widths", None)
        or metadata.get("matryoshka_widths")
        or details.get("matryoshka_widths")
    )
    return cumulative_widths(recorded, sae.cfg.d_sae) if recorded else [sae.cfg.d_sae]


def inference_model(sae: SAE[Any]) -> SAE[Any]:
    """The stock model that saving and loading `sae` gives; `sae` itself if it already is one.

    Args:
        sae: A training SAE or transcoder, or a stock one; of a compiled one, what was compiled is taken.

    Returns:
        A model on the same device that reads the raw hook. A training object is copied, not changed. (If its
        trainer scales the activations, that has to be folded before, as the trainer does at the end; you are
        warned if it is not.)

    Raises:
        ValueError: `sae` is something else, such as the path of one, or its weights are not of its dtype.
    """
    sae = uncompiled(sae)
    _require_sae(sae)
    _require_its_dtype(sae)
    if sae.cfg.normalize_activations in SCALED:
        warnings.warn(
            f"normalize_activations={sae.cfg.normalize_activations!r}: it was trained on scaled activations, "
            "and by what is not folded into its weights, so that it is wrong on those of the language model. "
            "Of a checkpoint, saelens_matryoshka.formats.saelens.open_folder folds it.",
            stacklevel=2,
        )
    return as_saved(sae)


def as_saved(sae: SAE[Any]) -> SAE[Any]:
    """`inference_model` of one of which all is in order, but perhaps for the scale of its activations."""
    if not isinstance(sae, TrainingSAE):
        return sae
    with sae.keeping_threshold() if isinstance(sae, MatryoshkaTraining) else nullcontext():
        state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    cfg = copy.deepcopy(sae.cfg.get_inference_sae_cfg_dict())
    model = _build(cfg | {"d_sae": len(state["W_dec"])}, state, str(sae.device))
    model.cfg.d_sae = sae.cfg.d_sae  # of a shard, as in training, the whole dictionary's
    return model


def truncate(sae: SAE[Any], width: int) -> SAE[Any]:
    """The prefix of the first `width` latents, as a stock SAE or transcoder of its own.

    Args:
        sae: A nested SAE or transcoder, trained here or loaded.
        width: How many latents to keep: one of `matryoshka_widths(sae)`; of any other you are warned.

    Returns:
        A stock model with d_sae == width, on the same device, that shares no memory with `sae`.

    Raises:
        ValueError: `width` is not in 1 .. d_sae, or the activation of a latent depends on the others
            (TopK), so that a prefix is not a model of its own.
    """
    sae = inference_model(sae)
    width = plain_numbers(width)
    if isinstance(width, bool) or not isinstance(width, int) or not 0 < width <= sae.cfg.d_sae:
        raise ValueError(f"width={width!r} must be an integer from 1 to d_sae={sae.cfg.d_sae}.")
    architecture = sae.cfg.architecture()
    if architecture not in _PER_LATENT_ARCHITECTURES:
        raise ValueError(
            f"A prefix of a {architecture!r} model is not a model of its own: which latents are active "
            "depends on all of them. Convert it to JumpReLU thresholds first."
        )
    widths = matryoshka_widths(sae)
    if width not in widths:
        warnings.warn(
            f"width={width} is not one of the trained prefixes {widths}: nothing in training asked the "
            "first latents to reconstruct on their own there.",
            stacklevel=2,
        )
    state = {
        name: tensor.narrow(_LATENT_DIM[name], 0, width) if name in _LATENT_DIM else tensor
        for name, tensor in sae.state_dict().items()
    }
    cfg = copy.deepcopy(sae.cfg.to_dict())
    cfg["d_sae"] = width
    cfg["metadata"]["matryoshka_widths"] = [w for w in widths if w < width] + [width]
    return _build(cfg, {name: tensor.clone() for name, tensor in state.items()}, str(sae.device))


def decode_prefixes(sae: SAE[Any], feature_acts: torch.Tensor, *, group: Group = ALONE) -> torch.Tensor:
    """The decoder's output for every prefix at once, each latent decoded once.

        outputs = sm.decode_prefixes(sae, sae.encode(x))

    Args:
        sae: A nested SAE or transcoder.
        feature_acts: `[*batch, d_sae]`, as `sae.encode` gives them, or sparse.
        group: The processes that have the dictionary in shards, of which `sae` is this one's.

    Returns:
        `[n_levels, *batch, d_out]`, narrowest prefix first; the last equals `sae.decode(feature_acts)`.
        Like `decode`, it is without the skip of a skip transcoder.

    Raises:
        ValueError: `feature_acts` is no tensor, or not of all the latents.
    """
    sae = uncompiled(sae)
    _require_sae(sae)
    d_sae = len(sae.W_dec)
    if not isinstance(feature_acts, torch.Tensor):
        raise ValueError(f"feature_acts is a {type(feature_acts).__name__}, and must be a tensor.")
    if feature_acts.shape[-1:] != (d_sae,):
        raise ValueError(
            f"feature_acts has shape {list(feature_acts.shape)}, expected [*batch, d_sae={d_sae}]."
        )
    if feature_acts.layout != torch.strided:
        feature_acts = feature_acts.to_dense()
    widths = matryoshka_widths(sae)
    if len(widths) == 1 and group is ALONE:
        return sae.decode(feature_acts)[None]
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        feature_acts = feature_acts / sae.W_dec.norm(dim=-1)
    parts = nested_decode(feature_acts, sae.W_dec, torch.zeros_like(sae.b_dec), group.widths(widths))
    outputs = group.sum(parts, "latents") + sae.b_dec
    # What `decode` does after the product. A stock transcoder: nothing, it has normalised another tensor.
    if isinstance(sae, MatryoshkaTrainingTranscoder):
        return sae.unscaled(outputs)
    if isinstance(sae, Transcoder):
        return outputs
    return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(outputs), sae.d_head)


def predict_prefixes(
    sae: SAE[Any], x: torch.Tensor, feature_acts: torch.Tensor, *, group: Group = ALONE
) -> torch.Tensor:
    """What every prefix predicts for `x`, skip included: `[n_levels, *batch, d_out]`."""
    outputs = decode_prefixes(sae, feature_acts, group=group)
    W_skip = getattr(sae, "W_skip", None)
    return outputs if W_skip is None else outputs + x.to(outputs.dtype) @ W_skip.T


def _require_sae(sae: object) -> None:
    if not isinstance(uncompiled(sae), SAE):
        raise ValueError(
            f"sae={str(sae)[:60]!r} is a {type(sae).__name__}, and must be an SAE or transcoder, such as "
            "SAE.load_from_disk(path) gives."
        )


def _require_its_dtype(sae: SAE[Any]) -> None:
    # SAELens's `to` changes sae.dtype, to which inputs are cast; torch's `half` and the like do not.
    if (found := next(sae.parameters()).dtype) != sae.dtype:
        raise ValueError(
            f"sae: its weights are {found}, and it casts what it reads to sae.dtype={sae.dtype}. Convert it "
            f"with sae.to({found}), not with methods such as half() and bfloat16()."
        )


def _build(cfg: dict[str, Any], state: dict[str, torch.Tensor], device: str) -> SAE[Any]:
    sae_class, cfg_class = get_sae_class(cfg["architecture"])
    # On the meta device first, so that no weights are made only to be replaced.
    sae = sae_class(cfg_class.from_dict({**cfg, "device": "meta"}))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state, assign=True)
    sae.to(device=device)
    sae.eval()
    return sae
