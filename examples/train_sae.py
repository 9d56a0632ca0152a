"""Train a Matryoshka SAE of the residual stream with SAELens's stock runner.

With its default settings `matryoshka_sae` is the same function as SAELens's `matryoshka_batchtopk`; here
it has the recommended ones.
Runs offline in under a minute on a laptop.
"""

from rich.console import Console
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

import saelens_matryoshka as sm
from saelens_matryoshka import tiny

sae_cfg = sm.MatryoshkaTrainingSAEConfig.recommended(d_in=128, d_sae=1024, k=16)
size = dict(training_tokens=200_000, train_batch_size_tokens=1024)
cfg = LanguageModelSAERunnerConfig(
    sae=sae_cfg,
    hook_name="blocks.2.hook_resid_post",
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
    output_path="output/sae",
)
model = tiny.load_hooked_transformer()
LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=tiny.text.dataset("train")).run()

sae = SAE.load_from_disk("output/sae")  # a stock JumpReLUSAE
result = sm.evaluate(sae, model, tiny.text.dataset("held_out"), n_tokens=20_000, n_ce_tokens=4_000)
Console().print(result.table())  # a row per prefix
