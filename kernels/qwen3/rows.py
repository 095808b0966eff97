"""Where the tokens of one prefill or decode dispatch live in the paged cache, checked before anything is written.

Owns nothing, no torch. Prefill and decode are one thing here: rows of one or more consecutive positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError

__all__ = ["RowPlan", "check_rows", "known_tokens", "plan_rows", "split_ragged"]

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@attrs.frozen(eq=False)
class RowPlan:
    """Rows of a dispatch: row r owns tokens ``offsets[r] : offsets[r + 1]``, positions from ``starts[r]`` on.

    A slot is a token's place in the cache: page × page size + offset inside the page.
    """

    tokens: Int32  # (T,)
    positions: Int32  # (T,)
    slots: Int64  # (T,) where each token's key and value go; distinct
    starts: list[int]  # (R,) context before the row
    ends: list[int]  # (R,) context with the row: starts + lengths
    offsets: list[int]  # (R + 1,)
    tables: Int32  # (R, P) pages by position; only the first ceil(end / page size) of a row are read
    rows: list[int]  # (R,) where the row's last hidden state goes, -1: nowhere

    def context(self, begin: int, end: int) -> int:
        """Positions that tokens ``begin:end`` attend to, each row's once, however many of its tokens are among them."""
        owners = zip(self.starts, self.offsets, self.offsets[1:], strict=False)
        return sum(start + min(last, end) - first for start, first, last in owners if first < end and last > begin)


def plan_rows(
    where: str, static: Mapping[str, Any], tokens: Int32, starts: Int32, lengths: Int32, tables: Int32, rows: Int32
) -> RowPlan:
    """Check and lay out the rows of a dispatch of a program with configuration ``static``.

    tokens (T,); starts, lengths, rows (R,); tables (R, P). Raises ``KernelError``, prefixed with ``where``, for tokens
    outside the vocabulary, positions outside the context, pages outside the cache, two rows in one slot or one output.
    """
    if not len(tokens) or int(lengths.sum()) != len(tokens) or int(lengths.min()) < 1:
        raise KernelError(f"{where}: lengths {lengths.tolist()[:8]} do not divide {len(tokens)} tokens into rows")
    if len(tokens) > max(static["max_num_batched_tokens"], static["max_num_seqs"]):
        raise KernelError(
            f"{where}: {len(tokens)} tokens; max_num_batched_tokens is {static['max_num_batched_tokens']}"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= static["vocab_size"]:
        wrong = tokens[(tokens < 0) | (tokens >= static["vocab_size"])][0]
        raise KernelError(f"{where}: token id {wrong} is outside the vocabulary of {static['vocab_size']}")
    ends = starts.astype(np.int64) + lengths  # int32 might wrap around
    if int(starts.min()) < 0 or int(ends.max()) > static["max_model_len"]:
        raise KernelError(
            f"{where}: rows cover positions {int(starts.min())} to {int(ends.max()) - 1}; the context has"
            f" {static['max_model_len']}"
        )
    if int(rows.min()) < -1 or int(rows.max()) >= static["max_num_seqs"]:
        raise KernelError(f"{where}: output rows {rows.tolist()[:8]} must be -1 to {static['max_num_seqs'] - 1}")
    page_size = static["page_size"]
    pages = -(-ends // page_size)
    is_read = np.arange(tables.shape[1]) < pages[:, None]
    is_known = (tables >= 0) & (tables < static["num_pages"])
    if int(pages.max()) > tables.shape[1] or not (is_known | ~is_read).all():
        raise KernelError(
            f"{where}: block tables must name a page below {static['num_pages']} for each of a row's"
            f" {pages.tolist()[:8]} pages"
        )
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if len(lengths) == len(tokens):  # one token per row: decode, the hot path
        positions = starts
        slots = tables[np.arange(len(tokens)), positions // page_size].astype(np.int64) * page_size
    else:
        positions = np.arange(len(tokens), dtype=np.int32) + np.repeat(starts - offsets[:-1].astype(np.int32), lengths)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        slots = tables[owner, positions // page_size].astype(np.int64) * page_size
    slots += positions % page_size
    if len(slots) > 1:
        ordered = np.sort(slots)
        if (ordered[1:] == ordered[:-1]).any():
            raise KernelError(
                f"{where}: two tokens are written to one cache slot; block tables of writing rows must differ"
            )
    row_list = rows.tolist()
    if len(row_list) > 1:
        wanted = [row for row in row_list if row >= 0]
        if len(set(wanted)) != len(wanted):
            raise KernelError(f"{where}: two rows share an output row in {row_list[:8]}")
    return RowPlan(tokens, positions, slots, starts.tolist(), ends.tolist(), offsets.tolist(), tables, row_list)


def known_tokens(where: str, tokens: Int32, chosen: Int32) -> Int32:
    """The ids of decode's ``tokens`` (B,): a negative one, -1 - row, stands for ``chosen`` (rows,) at that row.

    Raises ``KernelError`` for a row that is not there.
    """
    is_chosen = tokens < 0
    if not is_chosen.any():
        return tokens
    rows = np.where(is_chosen, -1 - tokens, 0)
    if int(rows.max()) >= len(chosen):
        raise KernelError(
            f"{where}: a token is the one chosen for row {int(rows.max())}; rows are 0 to {len(chosen) - 1}"
        )
    return np.where(is_chosen, chosen[rows], tokens)


def check_rows(where: str, static: Mapping[str, Any], rows: Int32) -> Int32:
    """The rows of a buffer a program works on: at least one, distinct, inside the buffer. Raises ``KernelError``."""
    if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= static["max_num_seqs"]:
        raise KernelError(f"{where}: rows {rows.tolist()[:8]} must be one or more of 0 to {static['max_num_seqs'] - 1}")
    if len(set(rows.tolist())) != len(rows):
        raise KernelError(f"{where}: rows {rows.tolist()[:8]} must be distinct")
    return rows


def split_ragged(where: str, name: str, values: Int32, ends: Int32, vocab_size: int) -> list[Int32]:
    """Rows of a ragged array of token ids, from the end of each row in it. Raises ``KernelError``."""
    starts = np.concatenate([np.zeros(1, np.int32), ends[:-1]])
    if int((ends - starts).min()) < 0 or int(starts.min()) < 0 or int(ends[-1]) != len(values):
        raise KernelError(f"{where}: {name}_ends {ends.tolist()[:8]} do not divide {len(values)} ids into rows")
    if len(values) and (int(values.min()) < 0 or int(values.max()) >= vocab_size):
        wrong = values[(values < 0) | (values >= vocab_size)][0]
        raise KernelError(f"{where}: {name} holds token id {wrong}, outside the vocabulary of {vocab_size}")
    return [values[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
