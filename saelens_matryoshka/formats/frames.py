"""The two frames of an MLP's input, and moving a transcoder from one to the other.

A norm computes normalised·gain + offset. `ln2.hook_normalized` is before the gain, `mlp.hook_in` after it, so
a transcoder of one is a transcoder of the other once the gain is folded into its encoder (and skip). Where
a model has no norm behind its MLP, `mlp.hook_out` and `hook_mlp_out` are one tensor.
"""

from __future__ import annotations

from typing import Any

from saelens_matryoshka.formats.coder import SparseCoder, scale_input
from saelens_matryoshka.formats.files import FormatError
from saelens_matryoshka.sites import POST_NORM_ARCHITECTURES, block_hook, norm_gain

NORMALIZED, TRUE_INPUT = "ln2.hook_normalized", "mlp.hook_in"
FRAMES = {"normalized": NORMALIZED, "mlp_in": TRUE_INPUT}


def to_frame(coder: SparseCoder, frame: str, model: Any) -> SparseCoder:
    """The same function, read from another frame of the MLP's input.

    Args:
        coder: A transcoder that reads `ln2.hook_normalized` or `mlp.hook_in`.
        frame: "normalized" or "mlp_in".
        model: The language model, with norms not folded: HookedTransformer or TransformerBridge.

    Raises:
        FormatError: the coder reads another tensor, or there is no such frame.
        ValueError: the model's norms were folded.
    """
    if frame not in FRAMES:
        raise FormatError(f"There is no frame {frame!r}; there are {', '.join(FRAMES)}.")
    block = block_hook(coder.metadata.get("hook_name"))
    if block is None or block[1] not in FRAMES.values():
        raise FormatError(
            f"hook_name={coder.metadata.get('hook_name')!r} is neither {NORMALIZED} nor {TRUE_INPUT} of a "
            "block, so it has no other frame."
        )
    layer, hook = block
    if hook != FRAMES[frame]:
        gain, offset = norm_gain(model, f"blocks.{layer}.{NORMALIZED}")
        if frame == "mlp_in":  # x = (y - offset) / gain
            if not bool((gain != 0).all()):
                raise FormatError(f"The norm of layer {layer} has a gain of 0, which cannot be undone.")
            offset = None if offset is None else -offset / gain
            gain = 1 / gain
        coder = scale_input(coder, gain, offset)
    target = coder.metadata.get("hook_name_out")
    names = ("mlp.hook_out", "hook_mlp_out")
    wanted = names[0] if frame == "mlp_in" else names[1]
    target_block = block_hook(target)
    if target_block and target_block[1] in names and not has_post_norm(model):
        target = f"blocks.{target_block[0]}.{wanted}"
    return coder.with_metadata(
        hook_name=f"blocks.{layer}.{FRAMES[frame]}",
        hook_name_out=target,
        input_frame="normalized" if frame == "normalized" else None,
        **(dict.fromkeys(("hf_hook_name", "hf_hook_name_out")) if hook != FRAMES[frame] else {}),
    )


def has_post_norm(model: Any) -> bool:
    """Whether something stands between the MLP and the residual stream."""
    blocks: Any = getattr(model, "blocks", ())
    architecture = getattr(getattr(model, "cfg", None), "original_architecture", None)
    return architecture in POST_NORM_ARCHITECTURES or any(hasattr(block, "ln2_post") for block in blocks)
