"""A transcoder moved to the other side of a norm's gain is the same function of the language model."""

from __future__ import annotations

import pytest
import torch
from transformer_lens import HookedTransformer

from saelens_matryoshka.formats import FormatError, SparseCoder
from saelens_matryoshka.formats.frames import to_frame
from tests import tiny_models
from tests.formats.coders import assert_same, expected_output, random_coder


def _coder(hook: str = "ln2.hook_normalized", target: str = "hook_mlp_out") -> SparseCoder:
    assert tiny_models.D_MODEL == 16
    return random_coder(skip=True, layer=1, hook_name=f"blocks.1.{hook}", hook_name_out=f"blocks.1.{target}")


@pytest.mark.parametrize("family", ["gpt2_hf", "llama_hf", "gemma2_hf"])
def test_the_moved_transcoder_predicts_the_same_on_a_real_model(family: str) -> None:
    bridge = tiny_models.bridge(getattr(tiny_models, family)())
    tokens = torch.randint(1, tiny_models.VOCAB, (2, 12))
    _, cache = bridge.run_with_cache(tokens)
    coder = _coder()
    moved = to_frame(coder, "mlp_in", bridge)
    assert moved.metadata["hook_name"] == "blocks.1.mlp.hook_in"
    torch.testing.assert_close(
        expected_output(moved, cache["blocks.1.mlp.hook_in"]),
        expected_output(coder, cache["blocks.1.ln2.hook_normalized"]),
        atol=2e-4,
        rtol=2e-4,
    )
    back = to_frame(moved, "normalized", bridge)
    assert back.metadata == coder.metadata
    torch.testing.assert_close(back.W_enc, coder.W_enc)


def test_the_names_of_the_modules_it_came_from_are_dropped() -> None:
    """Written for sparsify again, it would be taken for a transcoder of the other frame."""
    model = tiny_models.hooked_transformer(tiny_models.llama_hf())
    coder = _coder("mlp.hook_in", "mlp.hook_out").with_metadata(hf_hook_name="layers.1.mlp.input")
    moved = to_frame(coder, "normalized", model)
    assert "hf_hook_name" not in moved.metadata
    assert to_frame(coder, "mlp_in", model).metadata["hf_hook_name"] == "layers.1.mlp.input"


def test_the_target_is_renamed_only_where_no_norm_follows_the_mlp() -> None:
    llama = tiny_models.hooked_transformer(tiny_models.llama_hf())
    gemma = tiny_models.hooked_transformer(tiny_models.gemma2_hf())
    assert to_frame(_coder(), "mlp_in", llama).metadata["hook_name_out"] == "blocks.1.mlp.hook_out"
    assert to_frame(_coder(), "mlp_in", gemma).metadata["hook_name_out"] == "blocks.1.hook_mlp_out"


def test_the_frame_it_is_in_already_changes_nothing() -> None:
    model = tiny_models.hooked_transformer(tiny_models.gemma2_hf())
    coder = _coder("mlp.hook_in")
    assert_same(to_frame(coder, "mlp_in", model), coder)


def test_what_has_no_other_frame_is_refused(tiny_model: HookedTransformer) -> None:
    with pytest.raises(FormatError, match="no other frame"):
        to_frame(_coder("hook_resid_mid"), "mlp_in", tiny_model)
    with pytest.raises(FormatError, match="There is no frame 'raw'"):
        to_frame(_coder(), "raw", tiny_model)
    folded = tiny_models.hooked_transformer(tiny_models.gemma2_hf(), fold_ln=True)
    with pytest.raises(ValueError, match="folded"):
        to_frame(_coder(), "mlp_in", folded)
