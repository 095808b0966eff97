"""PagePool against a brute-force model: a page is free or held, never given out twice, and found by what it holds."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.actors.pages import PagePool, page_keys


def test_neighbouring_pages_are_preferred():
    pool = PagePool(8)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(2) == [3, 4]
    pool.release([1, 2])
    assert pool.allocate(1, after=4) == [5], "the page behind one's own comes first"
    assert pool.allocate(2, after=5) == [6, 7]
    assert pool.allocate(2) == [1, 2]
    assert pool.allocate(1) is None


def test_without_one_long_run_the_longest_runs_are_taken():
    pool = PagePool(9)
    pool.allocate(9)
    pool.release([0, 2, 4, 5, 6, 8])
    assert pool.allocate(4) == [4, 5, 0, 2]


def test_an_allocation_that_does_not_fit_takes_nothing():
    pool = PagePool(3)
    pool.allocate(1)
    assert pool.allocate(3) is None
    assert pool.num_free == 2
    pool.check_integrity()


def test_a_shared_page_is_free_after_its_last_holder():
    pool = PagePool(2)
    pages = pool.allocate(1)
    assert pages == [0]
    pool.share(pages)
    pool.release(pages)
    assert (pool.num_free, pool.references(0)) == (1, 1)
    pool.release(pages)
    assert (pool.num_free, pool.references(0)) == (2, 0)


@pytest.mark.parametrize("misuse", ["release", "share"])
def test_a_free_page_can_be_neither_released_nor_shared(misuse):
    pool = PagePool(1)
    with pytest.raises(AssertionError, match="page 0 is free"):
        getattr(pool, misuse)([0])


def test_a_page_that_is_withdrawn_is_found_no_more_and_blank_when_it_is_free():
    pool = PagePool(3)
    pages = pool.allocate(3)
    for page, key in zip(pages, (b"a", b"b", b"c"), strict=True):
        pool.enter(page, key)
    assert pool.withdraw(pages[1:]) == {1, 2}
    assert (pool.find([b"a"]), pool.find([b"b"]), pool.find([b"c"])) == ([0], [], [])
    pool.release(pages)
    assert (pool.num_free, pool.num_idle) == (3, 1)
    with pytest.raises(AssertionError, match="page 0 is free"):
        pool.withdraw([0])


def test_a_key_says_what_a_page_and_all_before_it_hold():
    tokens = np.arange(20, 31, dtype=np.int32)
    first = hashlib.blake2b(np.array([20, 21, 22, 23], "<i4").tobytes(), digest_size=16).digest()
    second = hashlib.blake2b(first + np.array([24, 25, 26, 27], "<i4").tobytes(), digest_size=16).digest()
    assert page_keys(tokens, 4) == [first, second]
    assert page_keys(tokens[4:], 4)[0] != second
    assert page_keys(tokens[:3], 4) == []


@pytest.mark.guarantee("R51")
def test_pages_that_can_be_found_are_given_out_last_the_longest_idle_first():
    pool = PagePool(6)
    older, newer = pool.allocate(2), pool.allocate(2)
    for page, key in zip([*older, *newer], "abcd", strict=True):
        pool.enter(page, key.encode())
    pool.release(older)
    pool.release(newer)
    assert (pool.num_free, pool.num_idle) == (6, 4)
    assert pool.allocate(2) == [4, 5], "pages that hold nothing come first"
    assert pool.allocate(1) == [older[1]], "then the end of the prefix that nobody has used for longest"
    assert pool.find([b"a", b"b"]) == older[:1]
    pool.share(older[:1])
    pool.release(older[:1])
    assert pool.allocate(1) == [newer[1]], "using a page makes it young again"
    assert pool.find([b"c"]) == newer[:1]
    pool.check_integrity()


def test_of_two_pages_with_the_same_content_the_first_is_found():
    pool = PagePool(3)
    pages = pool.allocate(2)
    for page in pages:
        pool.enter(page, b"same")
    assert pool.find([b"same", b"other", b"same"]) == [0]
    pool.release(pages)
    assert (pool.num_free, pool.num_idle) == (3, 1)
    pool.check_integrity()


def test_a_chip_without_its_memory_holds_nothing_to_be_found():
    pool = PagePool(3)
    for page, key in zip(pool.allocate(2), (b"a", b"b"), strict=True):
        pool.enter(page, key)
    pool.release([0])
    pool.forget()
    assert pool.find([b"a"]) == pool.find([b"b"]) == []
    assert (pool.num_free, pool.num_idle) == (2, 0)
    pool.check_integrity()


OPERATIONS = ["allocate", "share", "release", "enter", "withdraw", "find", "forget"]


@given(st.integers(1, 12), st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 12))))
@settings(max_examples=200, deadline=None, print_blob=True)
def test_no_page_is_lost_or_held_twice_whatever_happens(num_pages, operations):
    pool = PagePool(num_pages)
    holdings: list[list[int]] = []
    content: dict[bytes, int] = {}  # what could be found, if nothing had been evicted

    def held() -> list[int]:
        return [page for pages in holdings for page in pages]

    for operation, number in operations:
        key = bytes([number % 4])
        if operation == "allocate":
            free = num_pages - len(set(held()))
            blank = free - pool.num_idle
            pages = pool.allocate(number, after=held()[-1] if held() else None)
            assert (pages is None) == (number > free)
            if pages:
                assert len(set(pages)) == number
                assert not set(pages) & set(held())
                assert pool.num_idle == free - blank - max(0, number - blank), "no more is evicted than must be"
                holdings.append(pages)
                content = {key: page for key, page in content.items() if page not in pages}
        elif operation == "find":
            found = pool.find([key])
            assert set(found) <= {content.get(key)}
            pool.share(found)
            holdings.append(found)
        elif operation == "forget":
            pool.forget()
            content = {}
        elif holdings:
            pages = holdings[number % len(holdings)]
            if operation == "share":
                pool.share(pages)
                holdings.append(pages)
            elif operation == "enter":
                if pages and pages[0] not in content.values():
                    pool.enter(pages[0], key)
                    content.setdefault(key, pages[0])
            elif operation == "withdraw":
                had_key = {page for page in pages if pool.key(page) is not None}
                assert pool.withdraw(pages) == had_key
                assert not had_key & set(pool.find([bytes([number]) for number in range(4)]))
                content = {key: page for key, page in content.items() if page not in had_key}
            else:
                pool.release(holdings.pop(number % len(holdings)))
        pool.check_integrity()
        now = held()
        assert [pool.references(page) for page in range(num_pages)] == [now.count(page) for page in range(num_pages)]
        assert pool.num_free == num_pages - len(set(now))
        assert all(
            pool.find([key]) == [page] for key, page in content.items() if pool.references(page) or pool.key(page)
        )
