"""The time that a training step waits for its batch."""

import time

import pytest

from spark3d.engine.logging import Waited


def test_only_the_waiting_is_counted_and_once() -> None:
    def slow():
        for n in range(3):
            time.sleep(0.02)
            yield n

    steps = Waited(slow())
    assert [next(steps), next(steps)] == [0, 1]
    time.sleep(0.3)  # the step itself
    assert 0.04 <= steps.lap() < 0.3
    assert steps.lap() == 0
    assert list(steps) == [2]
    with pytest.raises(StopIteration):
        next(steps)
