"""Train a Matryoshka transcoder of an MLP with SAELens's stock runner, and evaluate its prefixes.

Runs offline in under a minute on a laptop: the language model and its text are inside the package.
For another model drop the two `override_` arguments and set `model_name` ("gpt2", "gemma-2-2b", ...),
`dataset_path`, `d_in` and the layer in the hook names.
"""

from rich.console import Console
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

import saelens_matryoshka as sm
from saelens_matryoshka import tiny

sae_cfg = sm.MatryoshkaTrainingTranscoderConfig(
    d_in=128,
    d_sae=1024,
    k=16,
    matryoshka_widths=[64, 256, 512, 1024],
    hook_name_out="blocks.2.hook_mlp_out",
    input_gain="norm_weight",  # the MLP's true input: the normalised residual times the norm's weight
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
    output_path="output/transcoder",
)
model = tiny.load_hooked_transformer()
LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=tiny.text.dataset("train")).run()

transcoder = SAE.load_from_disk("output/transcoder")  # a stock JumpReLUTranscoder
result = sm.evaluate(transcoder, model, tiny.text.dataset("held_out"), n_tokens=20_000, n_ce_tokens=4_000)
Console().print(result.table())  # a row per prefix
