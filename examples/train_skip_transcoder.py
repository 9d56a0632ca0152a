"""Train a skip transcoder, and see how much of the MLP its linear part explains alone.

A skip transcoder predicts `W_skip x + b_dec + Σ f_j d_j`: what an MLP does linearly need not be spelled
out in latents. The skip is the same in every prefix.
Runs offline in under a minute on a laptop.
"""

from rich.console import Console
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

import saelens_matryoshka as sm
from saelens_matryoshka import tiny

sae_cfg = sm.MatryoshkaTrainingSkipTranscoderConfig.recommended(
    d_in=128,
    d_sae=1024,
    k=16,
    hook_name_out="blocks.2.hook_mlp_out",
    input_gain="norm_weight",
)
size = dict(training_tokens=200_000, train_batch_size_tokens=1024)
cfg = LanguageModelSAERunnerConfig(
    sae=sae_cfg,
    hook_name="blocks.2.ln2.hook_normalized",
    model_name="tiny",
    dataset_path="the Python standard library",
    context_size=256,
    **size,
    **sm.recommended_runner_fields(sae_cfg, **size),
    store_batch_size_prompts=8,
    n_batches_in_buffer=32,
    exclude_special_tokens=True,
    logger=LoggingConfig(log_to_wandb=False),
    checkpoint_path=None,
    output_path="output/skip_transcoder",
)
model = tiny.load_hooked_transformer()
LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=tiny.text.dataset("train")).run()

held_out = tiny.text.dataset("held_out")
transcoder = SAE.load_from_disk("output/skip_transcoder")  # a stock JumpReLUSkipTranscoder
result = sm.evaluate(transcoder, model, held_out, n_tokens=20_000, n_ce_tokens=4_000)
Console().print(result.table())

transcoder.threshold.data.fill_(float("inf"))  # no latent fires any more: what is left is the skip
alone = sm.evaluate(transcoder, model, held_out, n_tokens=20_000, n_ce_tokens=0).prefixes[-1]
print(f"The skip alone: FVU {alone.fvu:.3f}, L0 {alone.l0:.0f}.")
