"""``training.interrupt``: the first Ctrl-C is noted, the second raises, and the handler is put back in every case."""

import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl

from jebi.training import interrupt
from jebi.training.interrupt import StopOnInterrupt


@pytest.fixture(autouse=True)
def handler() -> Iterator[Any]:
    """Python's own handler, also where a shell started this process with Ctrl-C ignored."""
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    assert signal.signal(signal.SIGINT, outer) is signal.default_int_handler


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def ask(stop: StopOnInterrupt) -> TrainerControl:
    nothing: Any = SimpleNamespace()
    return stop.on_step_end(nothing, nothing, TrainerControl())


def test_without_an_interrupt_the_run_goes_on() -> None:
    stop = StopOnInterrupt()
    with stop.listening():
        control = ask(stop)
    assert (control.should_save, control.should_training_stop) == (False, False)


def test_the_first_is_noted_and_the_step_s_end_saves_and_stops() -> None:
    stop = StopOnInterrupt()
    with stop.listening():
        ctrl_c()
        control = ask(stop)
    assert stop.interrupted
    assert (control.should_save, control.should_training_stop) == (True, True)


def test_the_second_stops_at_once() -> None:
    with StopOnInterrupt().listening():
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_the_launcher_s_echo_is_not_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopOnInterrupt().listening(ranks=2):
        ctrl_c()
        ctrl_c()
        monkeypatch.setattr(interrupt, "ECHO_SECONDS", 0.0)
    with StopOnInterrupt().listening(ranks=2):
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()


def test_several_processes_stop_when_all_do() -> None:
    """One that heard nothing stops as the others do, and takes what it hears later for the same Ctrl-C."""
    heard: list[bool] = []
    stop = StopOnInterrupt()
    with stop.listening(lambda asked: heard.append(asked) or len(heard) == 2, ranks=2):
        assert not ask(stop).should_training_stop
        assert ask(stop).should_training_stop
        ctrl_c()
    assert heard == [False, False]
    assert stop.interrupted


def test_outside_it_ctrl_c_is_pythons() -> None:
    stop = StopOnInterrupt()
    with stop.listening():
        pass
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()
    assert not stop.interrupted


def test_the_handler_is_put_back_after_an_error(handler: Any) -> None:
    def train() -> None:
        with StopOnInterrupt().listening():
            assert signal.getsignal(signal.SIGINT) is not handler
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        train()


def test_another_thread_trains_without_listening(handler: Any) -> None:
    seen = []

    def train() -> None:
        with StopOnInterrupt().listening():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [handler]
