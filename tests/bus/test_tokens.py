"""Packed token ids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.bus import pack_tokens, unpack_tokens
from chipbus.errors import BadFrame


@settings(deadline=None, print_blob=True, max_examples=100)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50))
def test_ids_survive_packing_as_lists_and_as_arrays(ids: list[int]) -> None:
    assert unpack_tokens(pack_tokens(ids)).tolist() == ids
    assert pack_tokens(np.array(ids, dtype=np.int64)) == pack_tokens(ids)


def test_packed_ids_are_little_endian_int32() -> None:
    assert pack_tokens([1, 258]) == b"\x01\0\0\0\x02\x01\0\0"
    assert unpack_tokens(b"\x01\0\0\0").dtype == np.int32


@pytest.mark.parametrize("ids", [[2**31], np.array([2**31]), np.array([-(2**40), 1])])
def test_an_id_outside_int32_is_refused(ids: list[int]) -> None:
    with pytest.raises(OverflowError):
        pack_tokens(ids)


def test_half_a_token_is_a_bad_frame() -> None:
    with pytest.raises(BadFrame, match="5 bytes"):
        unpack_tokens(b"12345")
