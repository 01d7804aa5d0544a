"""A signal stops the loop between two steps, and the handlers that were there come back."""

import os
import signal

import pytest

from moe_jax.train.signals import StopSignal


def send(number):
  os.kill(os.getpid(), number)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT], ids=['SIGTERM', 'SIGINT'])
def test_signal_requests_a_stop(number, caplog):
  with StopSignal() as stop:
    assert not stop.stop_requested(1)
    send(number)
    assert stop.stop_requested(2) and stop.stop_requested(3)
  assert [r.getMessage() for r in caplog.records] == ['asked to stop: stopping after step 2']


def test_second_interrupt_does_not_wait():
  with StopSignal() as stop:
    send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      send(signal.SIGINT)
    assert stop.stop_requested(1)


def test_terminating_twice_still_stops_in_order():
  with StopSignal() as stop:
    send(signal.SIGTERM)
    send(signal.SIGTERM)
    send(signal.SIGINT)
    assert stop.stop_requested(1)


def test_handlers_are_restored():
  handlers = lambda: [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  before = handlers()
  with pytest.raises(RuntimeError), StopSignal():
    assert handlers() != before
    raise RuntimeError
  assert handlers() == before
