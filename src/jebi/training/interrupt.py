"""Ctrl-C during training: finish the step, save, stop. A second Ctrl-C stops at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnInterrupt(TrainerCallback):
    """Notes the first Ctrl-C and asks the trainer to save and stop after the step under way."""

    def __init__(self) -> None:
        self.interrupted = False
        self.saved = False
        """Whether a step's end came after Ctrl-C, with which Trainer saves."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop after this step if Ctrl-C came."""
        if self.interrupted:
            control.should_save = self.saved = True
            control.should_training_stop = True
        return control

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the first Ctrl-C is noted instead of raised. Only a main thread can listen."""
        self.interrupted = self.saved = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
