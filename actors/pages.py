"""Which KV pages of a replica are free, how many hold on to each of the others, and what the pages hold that is cached.

Owns: page free list, reference counts and prefix cache of one replica core. Thread: the core's bus loop.

    free ──allocate──▶ used ◀──enter, withdraw──▶ used, with a key ──last release──▶ idle: free, but found by its key
     ▲ ▲                │                               ▲                             │  │
     │ └─last release───┘                               └───────────share─────────────┘  │
     └──────────────────allocate, when nothing else is free: the longest idle first──────┘
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["PagePool", "page_keys"]

_FREE = b"\x01"


def page_keys(tokens: NDArray[np.int32], page_size: int, before: bytes = b"") -> list[bytes]:
    """What names the content of each whole page of ``tokens`` (T,): equal keys, equal tokens from position 0 on.

    BLAKE2b-128 over the key of the page before (nothing for the first) and the page's ids, 4 bytes little-endian each.
    ``before``: key of the page before ``tokens``.
    """
    data, width = tokens.astype("<i4", copy=False).tobytes(), 4 * page_size
    keys, key = [], before
    for begin in range(0, len(data) - width + 1, width):
        key = hashlib.blake2b(key + data[begin : begin + width], digest_size=16).digest()
        keys.append(key)
    return keys


class PagePool:
    """``num_pages`` pages, numbered from 0. A page is free, or used with a reference count of at least 1."""

    def __init__(self, num_pages: int) -> None:
        self._free = bytearray(_FREE * num_pages)  # bytes, so that the search for a run of free pages is one C call
        self._references = [0] * num_pages
        self._num_blank = num_pages  # set in _free: free, and nobody will look for what they hold
        self._pages: dict[bytes, int] = {}  # by key
        self._keys: dict[int, bytes] = {}  # the same, by page
        self._idle: dict[int, None] = {}  # free pages that have a key, the longest idle first

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return len(self._references)

    @property
    def num_free(self) -> int:
        """Pages nobody holds, idle ones too."""
        return self._num_blank + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Of the free pages, those that can still be found by their key."""
        return len(self._idle)

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """Take ``count`` free pages, each with one reference; None, and nothing taken, if there are not so many.

        Idle pages are taken, and their keys forgotten, only when nothing else is free. Prefers the pages that follow
        page ``after``, then one run, then few long runs: neighbouring pages read faster. The same calls in the same
        order give the same pages.
        """
        if count > self.num_free:
            return None
        while count > self._num_blank:
            self._evict(next(iter(self._idle)))
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

    def enter(self, page: int, key: bytes) -> None:
        """Let a used page be found by ``key``. If another page is already, this one stays without."""
        assert self._references[page] > 0, f"page {page} is free; it holds nothing to be found"
        assert page not in self._keys, f"page {page} has a key"
        if key not in self._pages:
            self._pages[key] = page
            self._keys[page] = key

    def withdraw(self, pages: Iterable[int]) -> set[int]:
        """Let these used pages be found no more, as they will not hold what was said. Returns those that had a key."""
        withdrawn = {page for page in pages if page in self._keys}
        for page in withdrawn:
            assert self._references[page] > 0, f"page {page} is free; what it holds is as it was"
            del self._pages[self._keys.pop(page)]
        return withdrawn

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the first ``keys``, up to the first that is not there. They may be idle: ``share`` them."""
        found = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def forget(self) -> None:
        """The pages have lost what they held: none is found any more."""
        while self._idle:
            self._evict(next(iter(self._idle)))
        self._pages.clear()
        self._keys.clear()

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each of these used or idle pages."""
        for page in pages:
            if not self._references[page]:
                assert page in self._idle, f"page {page} is free; it cannot be shared"
                del self._idle[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each page; a page without references is free.

        Those with a key become idle last page first: the end of a prefix is of use to fewer than its beginning.
        """
        for page in reversed(pages):
            assert self._references[page] > 0, f"page {page} is free; it cannot be released"
            self._references[page] -= 1
            if not self._references[page]:
                if page in self._keys:
                    self._idle[page] = None
                else:
                    self._blank(page)

    def references(self, page: int) -> int:
        """How many hold ``page``; 0 if it is free."""
        return self._references[page]

    def key(self, page: int) -> bytes | None:
        """What ``page`` can be found by; None if by nothing."""
        return self._keys.get(page)

    def check_integrity(self) -> None:
        """Assert that blank, idle and used pages are all pages, each exactly one of the three, and keys one to one."""
        assert self._num_blank == sum(self._free), "the count of free pages is off"
        for page, count in enumerate(self._references):
            assert count >= 0, f"page {page} has {count} references"
            assert bool(self._free[page]) + (page in self._idle) == (count == 0), (
                f"page {page} has {count} references, free {self._free[page]}, idle {page in self._idle}"
            )
            assert not (self._free[page] and page in self._keys), f"page {page} is blank and has a key"
        assert self._idle.keys() <= self._keys.keys(), "an idle page has no key"
        assert self._pages == {key: page for page, key in self._keys.items()}, "keys and pages disagree"

    def _take(self, start: int, length: int, taken: list[int]) -> None:
        for page in range(start, start + length):
            self._free[page] = False
            self._references[page] = 1
            taken.append(page)
        self._num_blank -= length

    def _evict(self, page: int) -> None:
        del self._idle[page]
        del self._pages[self._keys.pop(page)]
        self._blank(page)

    def _blank(self, page: int) -> None:
        self._free[page] = True
        self._num_blank += 1
