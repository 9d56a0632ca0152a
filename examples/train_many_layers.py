"""Train transcoders of all layers in lockstep: the language model runs once for all of them.

Each is trained as it would be alone, into a folder of its own.
Runs offline in about a minute on a laptop.
"""

from sae_lens import SAE, LanguageModelSAERunnerConfig, LoggingConfig

import saelens_matryoshka as sm
from saelens_matryoshka import tiny
from saelens_matryoshka.layers import train_layers

LAYERS = range(4)
model = tiny.load_hooked_transformer()
size = dict(training_tokens=200_000, train_batch_size_tokens=1024)

cfgs = {}
for layer in LAYERS:
    source, target = sm.find_site(model, layer, "mlp_in"), sm.find_site(model, layer, "mlp_out")
    sae_cfg = sm.MatryoshkaTrainingTranscoderConfig.recommended(
        d_in=128,
        d_sae=1024,
        k=16,
        hook_name_out=target.hook_name,
        input_gain="norm_weight",
    )
    cfgs[f"layer_{layer}"] = LanguageModelSAERunnerConfig(
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
        output_path=f"output/layers/layer_{layer}",
    )
train_layers(cfgs, override_model=model, override_dataset=tiny.text.dataset("train"))

held_out = tiny.text.dataset("held_out")
print("FVU of every prefix, by layer:")
for name, cfg in cfgs.items():
    transcoder = SAE.load_from_disk(cfg.output_path)
    prefixes = sm.evaluate(transcoder, model, held_out, n_tokens=20_000, n_ce_tokens=0).prefixes
    print(f"  {name}: " + ", ".join(f"{prefix.width:,} → {prefix.fvu:.3f}" for prefix in prefixes))
