"""The seams into SAELens, each with a test that says what moved when a release moves it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    ActivationsStore,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    SAETrainer,
    StandardTrainingSAEConfig,
    TrainingSAE,
    llm_sae_training_runner,
)
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.training import activations_store
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

from saelens_matryoshka import seams
from saelens_matryoshka.evaluation import metrics


def test_seam_runner_builds_its_store_with_from_config() -> None:
    """If this fails, SAELens's runner builds its activation store in another way than we redirect."""
    source = inspect.getsource(LanguageModelSAETrainingRunner.__init__)
    assert "ActivationsStore.from_config(" in source
    assert source.index("ActivationsStore.from_config(") < source.index("TrainingSAE.from_dict(")


def test_seam_runner_trains_with_trainer_fit() -> None:
    """If this fails, SAELens's runner does not train through SAETrainer.fit any more."""
    source = inspect.getsource(LanguageModelSAETrainingRunner)
    assert "trainer.fit()" in source
    assert "evaluator=self.evaluator" in source


def test_seam_runner_of_many_saes_has_them_in_its_config() -> None:
    """If this fails, a transcoder that SAELens's MultiSAETrainingRunner cannot train is not refused there."""
    config = MultiSAETrainingRunnerConfig({"sae": StandardTrainingSAEConfig(d_in=4, d_sae=8)}, "hook")
    assert list(config.saes) == ["sae"]
    assert "sae_class(sae_cfg)" in inspect.getsource(MultiSAETrainingRunner.__init__)


def test_seam_trainer_shows_its_progress_with_update_pbar() -> None:
    """If this fails, the progress bar of our architectures has fallen back to SAELens's own."""
    parameters = list(inspect.signature(SAETrainer._update_pbar).parameters)
    assert parameters == ["self", "step_output", "pbar", "update_interval"]
    assert "self._update_pbar(step_output, pbar)" in inspect.getsource(
        inspect.getmodule(SAETrainer)  # type: ignore[arg-type]
    )


def test_seam_command_line_is_parsed_from_the_registry() -> None:
    source = inspect.getsource(llm_sae_training_runner._parse_cfg_args)
    assert "SAE_TRAINING_CLASS_REGISTRY" in source


def test_seam_store_yields_what_get_activations_gives() -> None:
    """The paired store replaces get_activations and the width of a row, nothing else."""
    source = inspect.getsource(ActivationsStore.get_raw_llm_batch)
    assert "self.get_activations(batch_tokens)" in source
    assert "reshape(-1, d_in)" in source
    assert callable(ActivationsStore.get_multi_hook_activations)


def test_seam_sums_of_explained_variance_are_numbers_and_tensors() -> None:
    """If this fails, an evaluation that goes on loses sums of SAELens's ExplainedVarianceCalculator."""
    calculator, restored = ExplainedVarianceCalculator(), ExplainedVarianceCalculator()
    calculator.add_batch(torch.randn(5, 3), torch.randn(5, 3))
    metrics.restore(restored, metrics.state_of(calculator))
    assert restored.compute() == calculator.compute() != ExplainedVarianceCalculator().compute()
    for value in vars(calculator).values():
        assert isinstance(value, int | float | torch.Tensor)


def test_seam_saving_goes_through_the_processed_state_dict() -> None:
    source = inspect.getsource(TrainingSAE.save_inference_model)
    assert "self.process_state_dict_for_saving_inference(state_dict)" in source
    assert "self.process_state_dict_for_saving(state_dict)" in inspect.getsource(SAE.save_model)


def test_a_moved_seam_is_told_in_plain_words() -> None:
    class Moved:
        def fit(self, other: Any) -> None: ...

    with pytest.raises(ImportError, match=r"has changed Moved.fit\(self\)"):
        seams.redirect(Moved, "fit", ["self"], lambda stock: stock)
    with pytest.raises(ImportError, match="has changed Moved.run"):
        seams.redirect(Moved, "run", ["self"], lambda stock: stock)


def test_seam_store_iterates_over_its_sequences() -> None:
    """If this fails, a dataset that is too small is not noticed before training any more."""
    assert inspect.isgeneratorfunction(ActivationsStore._iterate_tokenized_sequences)
    assert "self.n_dataset_processed += 1" in inspect.getsource(ActivationsStore._iterate_raw_dataset)


def test_seam_store_knows_the_device_of_the_tokens() -> None:
    assert list(inspect.signature(activations_store._get_input_token_device).parameters) == ["model"]


def test_seam_store_starts_every_epoch_from_its_dataset() -> None:
    """If this fails, prompts held out for evaluation may come back in the next epoch."""
    assert "self.dataset" in inspect.getsource(ActivationsStore._iterate_raw_dataset)
    epoch = "self.iterable_sequences = self._iterate_tokenized_sequences()"
    assert epoch in inspect.getsource(ActivationsStore.get_batch_tokens)


def test_the_runner_loads_the_state_of_its_trainer_by_a_method_that_can_be_replaced() -> None:
    assert list(inspect.signature(SAETrainer.load_trainer_state).parameters) == ["self", "checkpoint_path"]
    source = inspect.getsource(LanguageModelSAETrainingRunner.run)
    assert "trainer.load_trainer_state(self.cfg.resume_from_checkpoint)" in source, (
        "SAELens's runner no longer loads a trainer's state by load_trainer_state, which "
        "seams.replacing_load_trainer_state replaces to resume a dictionary in shards."
    )
    stock, seen = SAETrainer.load_trainer_state, []
    with seams.replacing_load_trainer_state(lambda stock, trainer, path: seen.append((stock, trainer, path))):
        SAETrainer.load_trainer_state("trainer", "path")  # type: ignore[arg-type]
    assert seen == [(stock, "trainer", "path")]
    assert SAETrainer.load_trainer_state is stock


def test_seam_trainer_saves_before_it_counts_the_step() -> None:
    """If this fails, SAELens counts first: `seams.defer_checkpoints` is needed for this no longer."""
    source = inspect.getsource(inspect.getmodule(SAETrainer))  # type: ignore[arg-type]
    assert source.index("self._checkpoint_if_needed()") < source.index("self.n_training_steps += 1")


def test_seam_trainer_keeps_the_thresholds_it_has_passed() -> None:
    """If this fails, SAELens passes over them when it resumes: `seams.defer_checkpoints` need not."""
    source = inspect.getsource(SAETrainer.load_trainer_state)
    assert "checkpoint_thresholds" not in source
    assert "self.n_training_samples > self.checkpoint_thresholds[0]" in inspect.getsource(
        SAETrainer._checkpoint_if_needed
    )


def test_seam_runner_saves_no_weights_when_it_is_interrupted() -> None:
    """If this fails, docs/reliability.md must say something else of the stock runner."""
    stopped = inspect.getsource(LanguageModelSAETrainingRunner.run_trainer_with_interruption_handling)
    assert "self.save_checkpoint(checkpoint_path)" in stopped
    saved = inspect.getsource(LanguageModelSAETrainingRunner.save_checkpoint)
    assert "activations_store.save_to_checkpoint" in saved
    assert "save_model" not in saved
    assert "mkdir" not in saved  # and for want of the folder it fails


def test_seam_runner_prefetches_before_it_loads_the_position() -> None:
    """If this fails, the stock runner no longer trains a resumed run on batches from the data's start."""
    source = inspect.getsource(LanguageModelSAETrainingRunner.run)
    assert source.index("PrefetchingIterator(") < source.index("load_from_checkpoint(")


def test_seam_store_saves_its_place_as_a_number_of_documents() -> None:
    """If this fails, SAELens's own store saves more: `store.ResumableStore` may have become superfluous."""
    source = inspect.getsource(ActivationsStore.state_dict)
    assert source.count("torch.tensor(") == 1
    assert "n_dataset_processed" in source


def test_a_runner_writes_what_its_sae_is_trained_on_before_it_trains() -> None:
    """`seams.set_sae_metadata` calls it for the runners of several dictionaries."""
    parameters = list(inspect.signature(LanguageModelSAETrainingRunner._set_sae_metadata).parameters)
    assert parameters == ["self"], "LanguageModelSAETrainingRunner._set_sae_metadata has moved"


def test_the_multi_sae_trainer_asks_for_batches_by_name_and_has_the_seams_of_a_trainer() -> None:
    """`layers.LockstepTrainer` prepares its trainers, and hangs what follows a step where its bar is."""
    source = inspect.getsource(MultiSAETrainer.fit)
    for expected in (
        "trainer.step(multi_batch[self.hook_names[name]])",
        "self._checkpoint_if_needed()",
        "self._update_pbar(step_outputs, pbar)",
        "self._estimate_scaling_factors()",
    ):
        assert expected in source, f"MultiSAETrainer.fit has changed: {expected} is not in it"


@pytest.mark.parametrize(
    "architecture",
    [
        "standard",
        "transcoder",
        "skip_transcoder",
        "jumprelu",
        "jumprelu_transcoder",
        "jumprelu_skip_transcoder",
    ],
)
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_a_latent_s_activation_is_its_pre_activation_above_the_threshold(
    architecture: str, normalize: str
) -> None:
    """If this fails, `encode` of one of SAELens's ReLU or JumpReLU models does something else beside."""
    config = {"architecture": architecture, "d_in": 16, "d_sae": 64, "dtype": "float32", "device": "cpu"}
    is_transcoder = "transcoder" in architecture
    config |= {"d_out": 16} if is_transcoder else {}
    sae = SAE.from_dict(
        {**config, "normalize_activations": normalize, "apply_b_dec_to_input": not is_transcoder}
    )
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)  # thresholds below 0 too
    x = torch.randn(200, 16)
    thresholds = seams.firing_thresholds(sae)
    assert thresholds is not None
    pre = sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
    assert torch.equal(torch.where(pre > thresholds, pre, 0), sae.encode(x))


def test_what_is_no_matter_of_thresholds_has_none() -> None:
    config = {"d_in": 16, "d_sae": 64, "dtype": "float32", "device": "cpu"}
    for architecture in ("topk", "gated"):
        extra = {"k": 4} if architecture == "topk" else {}
        assert (
            seams.firing_thresholds(SAE.from_dict({"architecture": architecture, **config, **extra})) is None
        )
