"""`SFTTrainer`: transformers' Trainer, with one optimizer step run as a bag of rows.

What is overridden: the rows are tokenised and laid end to end; the micro-batches of a step wait until the last of
them and then run in as few passes as memory allows; evaluation runs the same way; checkpoints appear whole or not
at all. Everything else (schedules, logging, callbacks, saving strategies, resuming) is Trainer's own.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, PredictionOutput, TrainOutput

from jebi.data.control_tokens import as_ids
from jebi.data.findings import Report as DataReport
from jebi.data.heldout import summed_loss
from jebi.data.passes import Batch, collate, learnt_weight
from jebi.data.preparation import FormattingFunc
from jebi.errors import ConfigError
from jebi.models.hf import JebiForCausalLM
from jebi.plan.passes import PassPlan
from jebi.training import arguments, processes
from jebi.training.arguments import SFTConfig
from jebi.training.budget import within
from jebi.training.checkpoints import last_checkpoint, read_checkpoint, require_writable, staged
from jebi.training.engine import Engine, chosen, make_plan
from jebi.training.half import exact_sums
from jebi.training.interrupt import StopOnInterrupt
from jebi.training.loraplus import own_rates, split_rates
from jebi.training.losses import Losses
from jebi.training.optimizer import AdamW8bit, adam_settings, set_mode, tell_of_steps
from jebi.training.out_of_memory import Planned, explained
from jebi.training.pass_settings import Settings, settings_of
from jebi.training.planning import predict
from jebi.training.prefetch import Prefetch
from jebi.training.prepared import Prepare, prepare_of
from jebi.training.report import Meter, Report

logger = logging.getLogger(__name__)


class SFTTrainer(Trainer):
    """Supervised fine-tuning of a jebi model, with the arguments the tutorial's script passes."""

    model: JebiForCausalLM
    prepare: Prepare
    """Makes token rows of raw ones."""
    given: tuple[Any, Any]
    """The rows to train on and to evaluate on, as they were given."""
    texts: list[Any]
    """What the check reads beside the token rows: the raw ones, in the order of their numbers."""
    data_report: DataReport | None
    """What the check of the training rows found when `train` began; None on other processes than the first."""
    report: Report | None
    """Memory and time of the last `train`; also in ``report.json`` under the output folder."""

    def __init__(  # noqa: PLR0913  (the script's own argument list)
        self,
        model: JebiForCausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        dataset_text_field: str | None = None,
        max_seq_length: int | None = None,
        dataset_num_proc: int | None = None,
        packing: bool | None = None,
        formatting_func: FormattingFunc | None = None,
        args: TrainingArguments | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        """Prepare the rows and check every setting; nothing is trained yet.

        ``args`` may be plain `TrainingArguments` or `SFTConfig`; a keyword given here wins over `SFTConfig`'s field.

        Raises:
            ConfigError: a setting is impossible, contradicts the model, or is one jebi does not serve.
            DataError: the rows cannot be used.
        """
        arguments.require_trainable(model)
        args = args if args is not None else SFTConfig(output_dir="outputs")
        if notice := arguments.check(args, model.dtype, model.device):
            logger.warning(notice)
        processes.suit(args, model)
        self._ranks = processes.ranks_of(args, model)
        require_writable(Path(str(args.output_dir)))
        tokenizer = processing_class if processing_class is not None else tokenizer
        given = {"dataset_text_field": dataset_text_field, "max_seq_length": max_seq_length, "packing": packing}
        own = arguments.own_fields(args, dataset_num_proc=dataset_num_proc, **given)
        self._longest = arguments.longest_row(model, own.max_seq_length)
        self.prepare = prepare = prepare_of(tokenizer, own, self._longest, arguments.learning_of(args), formatting_func)
        self.given, self.texts = (train_dataset, eval_dataset), [train_dataset]
        self._rates = own_rates(own, optimizers[0] is not None)
        self._interrupt = StopOnInterrupt()
        self._plan: PassPlan | None = None
        self._staging: Path | None = None
        self.report = self.data_report = None
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=prepare(train_dataset),
            eval_dataset=prepare(eval_dataset),
            processing_class=tokenizer,
            callbacks=[*(callbacks or []), self._interrupt],
            optimizers=optimizers,
        )
        processes.require_plain(self.accelerator)
        if self.optimizer is not None:
            tell_of_steps(self.optimizer)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as Trainer does, measure it, and write ``report.json``.

        Raises:
            CheckError: the rows have a fault that makes training on them pointless, and that is not allowed.
            DivergedError: the loss became NaN or infinite; checkpoints written before stay.
            KeyboardInterrupt: Ctrl-C came; the step under way was finished and saved first.
            OutOfMemoryError: the longest row does not fit; or memory ran out, and what was learnt before was saved.
        """
        if self.train_dataset is None:
            raise ConfigError("train_dataset is missing.")
        self._bag: list[Batch] = []
        self._trained_tokens = self._own_tokens = self._trained_steps = 0
        if self.data_report is None and self.is_world_process_zero():
            ends, size = as_ids(self.model.generation_config.eos_token_id), self.model.model.shape.vocabulary
            self.data_report = self.prepare.check(self.train_dataset, self.texts, self.eval_dataset, ends, size)
        settings, plan = self._settings(), self._current_plan()
        self._losses, self._meter = Losses(), Meter(self.model.device)
        self._engine = Engine(self.model, plan, settings, self.accelerator, self._ranks)
        self._prefetch = Prefetch(self._engine.passes)
        predicted = predict(self.model, plan, settings)
        kept = within(self.model.device, settings.budget)
        told = explained(Planned(self.model, settings, plan, predicted), self._keep)
        listening = self._interrupt.listening(self._engine.stopping, self._ranks.count)
        try:
            with listening, exact_sums(self.model.dtype), kept, told:
                output = super().train(*args, **kwargs)
        finally:
            del self._engine, self._prefetch
            self._take_apart()
        self._losses.require_finite(self.args.output_dir)
        (interrupted,) = processes.summed(self.accelerator, self._interrupt.interrupted)
        report = self._meter.report(self._trained_steps, self._trained_tokens, chosen(self.model, plan), predicted)
        self.report = processes.of_all(report, self._ranks, self._own_tokens)
        if self.args.should_save:
            self.report.write(Path(str(self.args.output_dir)) / "report.json", self.state.log_history)
        if interrupted:
            if not self._interrupt.saved:
                self._save_checkpoint(self.model, None)
            raise KeyboardInterrupt
        return output

    def _keep(self) -> Path | None:
        """Save the steps made before memory ran out, where it did between two of them; the last checkpoint's folder."""
        if self._engine.passing and self.state.global_step and self._ranks.count == 1:
            self._save_checkpoint(self.model, None)
        return last_checkpoint(Path(str(self.args.output_dir)))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As Trainer's; rows given to `evaluate` itself are tokenised as the others were."""
        if isinstance(eval_dataset, Dataset | IterableDataset) and "lengths" not in (eval_dataset.column_names or ()):
            eval_dataset = self.prepare(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None, *_: Any, **__: Any
    ) -> DataLoader[Any]:
        """As Trainer's; but every process reads the rows of all of them, which stay on the host until they are cut."""
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description)
        rows = batch_size * self._ranks.count
        return processes.whole_loader(dataset, rows, sampler_fn, self.data_collator, self.args)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """As Trainer; rows that a stream's end left behind in the middle of a step count with the step they join."""
        batches = self._prefetch.take(epoch_iterator, num_batches)
        return batches, self._get_num_items_in_batch([*self._bag, *batches], device)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | int | None:
        """As Trainer's, but of weighed tokens the sum of their weights: a mean loss is a weighed mean.

        Rows, those of all processes, are on the host; so is their sum, or the host would wait for the card.
        """
        if not batch_samples:
            return None
        return torch.stack([learnt_weight(batch) for batch in batch_samples]).sum()

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Collect the step's micro-batches; with the last of them run forward and backward of all rows."""
        self._bag.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        assert num_items_in_batch is not None, "passes of one step must be weighted by the step's learnt tokens"
        batches, self._bag = self._bag, []
        if not model.training:  # for its own sake a no-op, and a walk through all modules
            model.train()
        set_mode(self.optimizer, "train")
        if self._trained_steps == 0:
            processes.require_same_rows(self.accelerator, batches)
        passes = self._prefetch.parts(batches)
        loss = self._engine.run(passes, num_items_in_batch, self._loss_of, self._interrupt.interrupted)
        self._meter.step()
        if self.state.global_step + 1 < self.state.max_steps:
            self._prefetch.ahead(self.args.gradient_accumulation_steps)
        self._own_tokens += sum(part.tokens for part in passes)
        self._trained_tokens += sum(sum(batch["lengths"]) for batch in batches)
        self._trained_steps += 1
        self._losses.add(self.state.global_step + 1, loss, [row for batch in batches for row in batch["rows"]])
        if self.args.torch_empty_cache_steps and self.state.global_step % self.args.torch_empty_cache_steps == 0:
            torch.cuda.empty_cache()
        return loss

    def floating_point_ops(self, inputs: Batch) -> int:
        """As Trainer's of all processes' rows, but by the model, which counts its parameters once."""
        return self.model.floating_point_ops(inputs)

    def store_flos(self) -> None:
        """As Trainer's, which would add up what every process has counted of all rows."""
        self.state.total_flos, self.current_flos = self.state.total_flos + self.current_flos, 0

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        """As Trainer's, which takes the rows of a batch for this process's, where they are those of all."""
        with processes.counted_once(self.state, self._ranks):
            super()._track_num_input_tokens(inputs)

    def _loss_of(self, model: nn.Module, inputs: dict[str, Any], items: Tensor | int) -> Tensor:
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=items)
        assert isinstance(loss, Tensor)
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's; before anything is logged or saved, the losses are looked at."""
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._losses.require_finite(self.args.output_dir)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluation_loop(
        self, dataloader: DataLoader[Any], *_: Any, metric_key_prefix: str = "eval", **__: Any
    ) -> EvalLoopOutput:
        """Mean loss over all learnt tokens, in passes no larger than training's; never any logits."""
        self.model.eval()
        set_mode(self.optimizer, "eval")
        seen = 0

        def counted() -> Iterator[Batch]:
            nonlocal seen
            for batch in dataloader:
                yield batch
                seen += len(batch["rows"])
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        tokens, smoothing = self._current_plan().tokens, self.args.label_smoothing_factor
        own, learnt = summed_loss(self.model, counted(), tokens, smoothing, self._ranks)
        if not self.is_in_train:
            self._take_apart()
        (total,) = processes.summed(self.accelerator, own)
        metrics = {f"{metric_key_prefix}_loss": total / learnt if learnt else 0.0}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=seen)  # type: ignore[arg-type]

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Not available: predictions are logits, which jebi never makes for whole data sets."""
        raise ConfigError("predict is not available; use evaluate for the loss, or model.generate for answers.")

    def _current_plan(self) -> PassPlan:
        if self._plan is None:
            self._plan = processes.agreed(self.accelerator, make_plan(self.model, self._settings()))
        return self._plan

    def _take_apart(self) -> None:
        """Leave the model as it was found: memory for what comes next, and no copies that another's training misses."""
        self._plan = None
        self.model.model.unstack()

    def _settings(self) -> Settings:
        # A loss of the user's own is computed his way.
        own_loss = type(self).compute_loss is not Trainer.compute_loss
        return settings_of(self.model, self.args, self._longest, not own_loss, self.train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As Trainer's; LoRA+ and trained embeddings have learning rates of their own."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*([] if model is None else [model]))
        if fresh:
            split_rates(optimizer, self.model, self._rates)
            tell_of_steps(optimizer)
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """jebi's own 8-bit AdamW where the script says ``adamw_8bit``; every other name is Trainer's."""
        if args.optim in arguments.OWN_OPTIMIZER:
            return AdamW8bit, adam_settings(args)
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """As Trainer's; over several processes not for accelerate to wrap once more: the engine adds gradients up."""
        wrapped = super()._wrap_model(model, training, dataloader)
        return wrapped if self._ranks.count == 1 else self.accelerator.prepare_model(wrapped, evaluation_mode=True)

    def _save_rng_state(self, output_dir: str) -> None:
        """As Trainer's; one process writes those of all."""
        processes.random_states(self._ranks, super()._save_rng_state, Path(output_dir))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "row", "lengths", "weights"]  # type: ignore[assignment]  # None upstream

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let Trainer write the checkpoint in a folder of its own, and move it into place when it is whole."""
        final = Path(super()._get_output_dir(trial))
        with staged(final, self.state, self.args, self.accelerator.wait_for_everyone) as self._staging:
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
        if self.args.should_save and self.args.push_to_hub:
            super()._push_from_checkpoint(str(final / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: an upload runs on in the background, so it begins when the folder is in its place."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As Trainer's; it also writes the settings, which must not take the hub token along."""
        token, self.args.hub_token = self.args.hub_token, None
        if self.model.adapter is None and self._staging is not None:
            state_dict = dict(self.model.named_parameters())  # a checkpoint goes on with every bit
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        read_checkpoint(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        read_checkpoint(self.model, Path(self.state.best_model_checkpoint))
