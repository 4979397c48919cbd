"""Steps that wait for their patches are told of, once."""

import logging
from types import SimpleNamespace

import pytest

from effseg.training.waiting import WaitWatch


def epoch(
    watch: WaitWatch, monkeypatch: pytest.MonkeyPatch, *, wait: float, step: float, n: int = 10
) -> None:
    """So many steps by a clock of our own; the first wait is of another length."""
    now = [100.0]
    monkeypatch.setattr("effseg.training.waiting.time.monotonic", lambda: now[0])
    trainer = SimpleNamespace(is_global_zero=True)
    watch.on_train_epoch_start(trainer, None)
    for i in range(n):
        now[0] += wait if i else 1000.0
        watch.on_train_batch_start(trainer, None, None, i)
        now[0] += step
        watch.on_train_batch_end(trainer, None, None, None, i)
    watch.on_train_epoch_end(trainer, None)


def test_waiting_longer_than_stepping_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watch = WaitWatch()
    with caplog.at_level(logging.WARNING, "effseg"):
        epoch(watch, monkeypatch, wait=1.0, step=2.0)
        assert watch.waited_seconds == pytest.approx(9)  # the first batch does not count
        assert watch.step_seconds == pytest.approx(18)
        epoch(watch, monkeypatch, wait=0.2, step=0.1)  # nobody minds two seconds
        assert caplog.messages == []
        for _ in range(2):
            epoch(watch, monkeypatch, wait=2.0, step=1.0)
    (said,) = caplog.messages
    assert "took 9 s and waited 18 s for patches" in said
