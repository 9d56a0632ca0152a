"""Is nesting worth it? A nested dictionary and a plain one, cut to the same prefixes, on the same tokens.

The plain dictionary is trained with one level, `[d_sae]`: nothing asks its first latents to do well on their
own. Runs offline in about a minute on a laptop.
"""

from pathlib import Path

from rich.console import Console
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig

import saelens_matryoshka as sm
from saelens_matryoshka import tiny

WIDTHS = [64, 256, 512, 1024]
model, text, held_out = (
    tiny.load_hooked_transformer(),
    tiny.text.dataset("train"),
    tiny.text.dataset("held_out"),
)
size = dict(training_tokens=200_000, train_batch_size_tokens=1024)


def train(widths: list[int], output_path: str) -> SAE:
    """Train a transcoder of layer 2 with these levels, and load what was saved."""
    sae_cfg = sm.MatryoshkaTrainingTranscoderConfig.recommended(
        d_in=128,
        d_sae=1024,
        k=16,
        matryoshka_widths=widths,
        hook_name_out="blocks.2.hook_mlp_out",
        input_gain="norm_weight",
    )
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
        output_path=output_path,
    )
    LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=text).run()
    return SAE.load_from_disk(output_path)


nested = train(WIDTHS, "output/nested")
plain = train([1024], "output/plain")
plain.cfg.metadata.matryoshka_widths = WIDTHS  # evaluate the same prefixes of it

compared = sm.compare({"nested": nested, "plain": plain}, model, held_out, n_tokens=20_000, n_ce_tokens=4_000)
Console().print(compared.tables())
Path("output/comparison.json").write_text(compared.to_json())

print("\nFVU of the first latents of each:")
results = compared.results
for ours, theirs in zip(results["nested"].prefixes, results["plain"].prefixes, strict=True):
    print(f"  {ours.width:>5,}: nested {ours.fvu:.3f}, plain {theirs.fvu:.3f}")
