"""The training bar on stderr: step, loss, learning rate, time left."""

import sys
from typing import Any

import typer
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from jebi.training.report import memory_before


class TrainingBar(TrainerCallback):
    """One bar for the whole training; the loss beside it is the last logged one."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The memory as training begins, and the bar, at the step a resumed run is at, unless ``disable_tqdm``.

        Of several processes the first one shows them.
        """
        if not state.is_world_process_zero:
            return
        typer.echo(memory_before(args.device).text())
        if args.disable_tqdm:
            return
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="Training", unit="step", file=sys.stderr
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One step further."""
        if self._bar is not None:
            self._bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the last loss."""
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}, lr {logs.get('learning_rate', 0):.1e}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the finished bar on screen."""
        if self._bar is not None:
            self._bar.close()
