"""Train a transcoder from one layer to a later one.

Source and target may be any two hooks, the target later than the source. Here the MLP's input of layer 1
predicts what the MLP of layer 2 adds to the residual stream; what the attention between the two brings from
other tokens is not in the source, so the FVU has a floor that no number of latents gets below.
Runs offline in under a minute on a laptop.
"""

from rich.console import Console
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

import saelens_matryoshka as sm
from saelens_matryoshka import tiny

model = tiny.load_hooked_transformer()
source = sm.find_site(model, 1, "mlp_in")  # a hook, and the norm's weight that makes it the MLP's true input
target = sm.find_site(model, 2, "mlp_out")

sae_cfg = sm.MatryoshkaTrainingTranscoderConfig.recommended(
    d_in=128,
    d_sae=1024,
    k=16,
    hook_name_out=target.hook_name,
    input_gain="none" if source.gain is None else "norm_weight",
)
size = dict(training_tokens=200_000, train_batch_size_tokens=1024)
cfg = LanguageModelSAERunnerConfig(
    sae=sae_cfg,
    hook_name=source.hook_name,
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
    output_path="output/cross_layer",
)
LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=tiny.text.dataset("train")).run()

transcoder = SAE.load_from_disk("output/cross_layer")
result = sm.evaluate(transcoder, model, tiny.text.dataset("held_out"), n_tokens=20_000, n_ce_tokens=4_000)
Console().print(result.table())
