"""Ctrl-C during training: finish the step, save, stop. A second Ctrl-C stops at once.

Over several processes all of them stop after the same step, whichever heard of it; what they agree by is the engine's.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ECHO_SECONDS = 5.0
"""For so long further signals are the first one's echo, in a process of several: a terminal sends Ctrl-C to all of
them, and so does their launcher when it hears of it."""


class StopOnInterrupt(TrainerCallback):
    """Notes the first Ctrl-C and asks the trainer to save and stop after the step under way."""

    def __init__(self) -> None:
        self.interrupted = False
        self.saved = False
        """Whether a step's end came after Ctrl-C, with which Trainer saves."""
        self._agreed: Callable[[bool], bool] = bool
        self._echo = self._since = 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop after this step if Ctrl-C came."""
        if self._agreed(self.interrupted):
            self._mark()
            control.should_save = self.saved = True
            control.should_training_stop = True
        return control

    @contextmanager
    def listening(self, agreed: Callable[[bool], bool] = bool, ranks: int = 1) -> Iterator[None]:
        """Within it the first Ctrl-C is noted instead of raised. Only a main thread can listen.

        Args:
            agreed: asked at every step's end, with whether Ctrl-C came here, whether the training is to stop.
            ranks: processes of the training.
        """
        self.interrupted = self.saved = False
        self._agreed, self._echo = agreed, ECHO_SECONDS if ranks > 1 else 0.0
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted and time.monotonic() - self._since >= self._echo:
            raise KeyboardInterrupt
        self._mark()

    def _mark(self) -> None:
        if not self.interrupted:
            self.interrupted, self._since = True, time.monotonic()
