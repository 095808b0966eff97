"""Which KV pages of a replica are free, and how many hold on to each of the others.

Owns: page free list and reference counts of one replica core. Thread: the core's bus loop.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["PagePool"]

_FREE = b"\x01"


class PagePool:
    """``num_pages`` pages, numbered from 0. A page is free, or used with a reference count of at least 1."""

    def __init__(self, num_pages: int) -> None:
        self._free = bytearray(_FREE * num_pages)  # bytes, so that the search for a run of free pages is one C call
        self._references = [0] * num_pages
        self._num_free = num_pages

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return self._num_free

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """Take ``count`` free pages, each with one reference; None, and nothing taken, if there are not so many.

        Prefers the pages that follow page ``after``, then one run, then few long runs: neighbouring pages read faster.
        The same calls in the same order give the same pages.
        """
        if count > self._num_free:
            return None
        taken: list[int] = []
        if after is not None:
            page = after + 1
            while len(taken) < count and page < len(self._free) and self._free[page]:
                self._take(page, 1, taken)
                page += 1
        length = count - len(taken)
        while len(taken) < count:
            length = min(length, count - len(taken))
            start = self._free.find(_FREE * length)
            if start < 0:
                length = (length + 1) // 2  # never below 1: one free page is left for each page still wanted
            else:
                self._take(start, length, taken)
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each of these used pages."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free; it cannot be shared"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less to each page; a page without references is free."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free; it cannot be released"
            self._references[page] -= 1
            if not self._references[page]:
                self._free[page] = True
                self._num_free += 1

    def references(self, page: int) -> int:
        """How many hold ``page``; 0 if it is free."""
        return self._references[page]

    def check_integrity(self) -> None:
        """Assert that free and used pages are all pages, each exactly one of the two."""
        assert self._num_free == sum(self._free), "the count of free pages is off"
        for page, count in enumerate(self._references):
            assert count >= 0, f"page {page} has {count} references"
            assert bool(self._free[page]) == (count == 0), (
                f"page {page} has {count} references and free {self._free[page]}"
            )

    def _take(self, start: int, length: int, taken: list[int]) -> None:
        for page in range(start, start + length):
            self._free[page] = False
            self._references[page] = 1
            taken.append(page)
        self._num_free -= length
