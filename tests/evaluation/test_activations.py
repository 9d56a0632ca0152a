"""What evaluating leaves of a language model."""

from __future__ import annotations

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

import saelens_matryoshka as sm
from saelens_matryoshka.evaluation.activations import in_eval_mode
from tests import tiny_models


def test_each_module_is_in_the_mode_it_was_in() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    try:
        with in_eval_mode(model):
            assert not any(module.training for module in model.modules())
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_model_drops_nothing_out_after_an_evaluation() -> None:
    model = tiny_models.proxy(tiny_models.gpt2_hf())  # in training mode, and what it runs is not
    tokens = torch.randint(1, tiny_models.VOCAB, (2, 8))
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=tiny_models.D_MODEL, d_sae=4))
    sae.cfg.metadata.hook_name = "transformer.h.1"
    before = model(tokens, return_type="logits")
    sm.evaluate(sae, model, tokens, exclude_special_tokens=False)
    assert torch.equal(model(tokens, return_type="logits"), before)
