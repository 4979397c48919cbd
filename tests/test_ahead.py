"""Work done ahead."""

import threading
from collections.abc import Iterator

import pytest

from effseg.inference.ahead import ahead


def test_the_next_item_is_made_while_one_is_used() -> None:
    made = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for index, event in enumerate(made):
            event.set()
            yield index

    for index, item in enumerate(ahead(items())):
        assert item == index
        # without a thread of its own it would never come
        assert made[min(index + 1, 3)].wait(timeout=30)
        assert not any(event.is_set() for event in made[index + 2 :])


def test_what_goes_wrong_is_raised_where_the_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise ValueError("no second one")

    got = ahead(items())
    assert next(got) == 0
    with pytest.raises(ValueError, match="no second one"):
        next(got)


def test_who_stops_early_ends_the_making() -> None:
    ended = []

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            ended.append(True)

    got = ahead(items())
    assert next(got) == 0
    got.close()
    assert ended == [True]
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]
