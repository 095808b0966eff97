"""PagePool against a brute-force model: a page is free or held, and never given out twice."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.actors.pages import PagePool


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


@given(st.integers(1, 12), st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 12))))
@settings(max_examples=150, deadline=None, print_blob=True)
def test_no_page_is_lost_or_held_twice_whatever_happens(num_pages, operations):
    pool = PagePool(num_pages)
    holdings: list[list[int]] = []
    for operation, number in operations:
        held = [page for pages in holdings for page in pages]
        if operation == "allocate":
            free = num_pages - len(set(held))
            pages = pool.allocate(number, after=held[-1] if held else None)
            assert (pages is None) == (number > free)
            if pages:
                assert len(set(pages)) == number
                assert not set(pages) & set(held)
                holdings.append(pages)
        elif holdings:
            index = number % len(holdings)
            if operation == "share":
                pool.share(holdings[index])
                holdings.append(holdings[index])
            else:
                pool.release(holdings.pop(index))
        pool.check_integrity()
        held = [page for pages in holdings for page in pages]
        assert [pool.references(page) for page in range(num_pages)] == [held.count(page) for page in range(num_pages)]
        assert pool.num_free == num_pages - len(set(held))
