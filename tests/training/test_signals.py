"""The first signal waits for a safe point, the second acts at once."""

import signal
import threading

import pytest

from workflow.training import signals
from workflow.training.signals import Terminated, deferred_signals


@pytest.fixture
def on_sigterm():
    usual = signal.getsignal(signal.SIGTERM)
    signals.raise_on_sigterm()
    yield
    signal.signal(signal.SIGTERM, usual)


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_waits_for_the_safe_point(on_sigterm, number, kind):
    told = []
    usual = signal.getsignal(number)
    with pytest.raises(kind), deferred_signals() as safe_point:
        safe_point()
        signal.raise_signal(number)
        told.append("the step is done")
        safe_point(lambda: told.append("saved"))
        told.append("not reached")
    assert told == ["the step is done", "saved"]
    assert signal.getsignal(number) is usual


def test_a_second_signal_acts_at_once(on_sigterm):
    with pytest.raises(Terminated), deferred_signals() as safe_point:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        safe_point(lambda: pytest.fail("it waited"))


def test_another_thread_is_left_alone():
    done = []

    def work():
        with deferred_signals() as safe_point:
            safe_point()
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
