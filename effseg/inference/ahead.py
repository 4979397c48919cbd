"""Work done while what was done before is used."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Generator[Item, None, None]) -> Iterator[Item]:
    """The same items, each made in a thread of its own while the one before is used.

    One more than without lives at a time. What goes wrong in the making is raised where the item
    would have come; who stops early waits for the one that is being made.
    """
    end = object()
    with closing(items), ThreadPoolExecutor(max_workers=1) as worker:
        coming = worker.submit(next, items, end)
        while True:
            item = coming.result()
            if item is end:
                return
            coming = worker.submit(next, items, end)
            yield item  # type: ignore[misc]
            del item  # or it would be held while the next is waited for
