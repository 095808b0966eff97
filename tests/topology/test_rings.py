"""Ring sizes: what is accepted, who decides, what they take, and what is suggested from recorded use."""

from __future__ import annotations

from typing import Any

import pytest

from chipbus.errors import ConfigError, MemoryExhausted
from chipbus.topology import RingRequest, RingSizes, RingUse, check_reservation, resolve_rings, suggest_rings

MIB = 1 << 20


def test_defaults_are_those_of_a_chip() -> None:
    sizes = resolve_rings(environ={})
    assert sizes == RingSizes()
    assert sizes.task_window == (16_384,) * 4
    assert sizes.heap == (256 * MIB,) * 4
    assert sizes.dep_pool == (16_384,) * 4


FIELDS = ["ring_task_window", "ring_heap", "ring_dep_pool"]


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        *((field, value, repr(value)) for field in FIELDS for value in (0, -4, True, False, 4.0, 1024.0, "4", b"abcd")),
        *((field, [4096] * count, f"{count} values") for field in FIELDS for count in (0, 1, 3, 5)),
        *(
            (field, [0, 4096, bad, 4096], f"{field}[2] is {bad!r}")
            for field in FIELDS
            for bad in (-1, True, False, 0.0, 4096.0, "4096", None)
        ),
        ("ring_task_window", 2, "2"),
        ("ring_task_window", 24, "24"),
        ("ring_task_window", [8, 8, 8, 9], "ring_task_window[3] is 9"),
        ("ring_heap", 512, "512"),
        ("ring_heap", 3072, "3072"),
        ("ring_dep_pool", 3, "3"),
        ("ring_dep_pool", 2**31, "2147483648"),
    ],
)
@pytest.mark.guarantee("G3")
def test_a_size_that_breaks_its_rule_is_refused_naming_field_rule_and_value(field: str, value: Any, shown: str) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        RingRequest(**{field: value})
    assert isinstance(caught.value, ConfigError)
    assert shown in str(caught.value)
    assert any(
        rule in str(caught.value) for rule in ("power of two of at least", "integer from", "one for each of 4 rings")
    )


def test_least_and_largest_sizes_are_accepted() -> None:
    RingRequest(ring_task_window=4, ring_heap=1024, ring_dep_pool=4)
    request = RingRequest(ring_task_window=[4, 0, 8, 1 << 20], ring_heap=(0, 0, 0, 1 << 40), ring_dep_pool=2**31 - 1)
    assert request.ring_task_window == (4, 0, 8, 1 << 20)
    assert resolve_rings(worker=request, environ={}).dep_pool == (2**31 - 1,) * 4


@pytest.mark.guarantee("G4")
def test_dispatch_beats_worker_beats_environment_beats_default_and_explain_names_the_source_of_each_value() -> None:
    environ = {"CHIPBUS_RING_HEAP": "1024", "CHIPBUS_RING_TASK_WINDOW": "4,0,8,16", "CHIPBUS_RING_DEP_POOL": "7"}
    worker = RingRequest(ring_dep_pool=[5, 6, 0, 8])
    sizes = resolve_rings(RingRequest(ring_heap=[0, 4096, 0, 2048]), worker, environ)
    assert sizes.task_window == (4, 16_384, 8, 16)
    assert sizes.heap == (256 * MIB, 4096, 256 * MIB, 2048)
    assert sizes.dep_pool == (5, 6, 16_384, 8)
    lines = sizes.explain().splitlines()
    assert len(lines) == 12
    assert "ring_task_window[0] = 4 (environment CHIPBUS_RING_TASK_WINDOW)" in lines
    assert "ring_task_window[1] = 16,384 (default, by 0 of environment CHIPBUS_RING_TASK_WINDOW)" in lines
    assert "ring_heap[1] = 4,096 (dispatch)" in lines
    assert "ring_heap[2] = 268,435,456 (default, by 0 of dispatch)" in lines
    assert "ring_dep_pool[3] = 8 (worker)" in lines
    assert resolve_rings(environ={}).explain().count("(default)") == 12


def test_the_environment_is_read_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHIPBUS_RING_HEAP", " 2048 ")
    monkeypatch.setenv("CHIPBUS_RING_TASK_WINDOW", "")
    assert resolve_rings().heap == (2048,) * 4
    assert resolve_rings().task_window == (16_384,) * 4


@pytest.mark.parametrize("text", ["many", "0", "1,2", "1.5", "4096,4096,4096,x", "3000", "4096,4096,4096,100"])
def test_an_environment_variable_that_is_not_understood_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="CHIPBUS_RING_HEAP"):
        resolve_rings(environ={"CHIPBUS_RING_HEAP": text})


def test_what_is_suggested_is_the_smallest_size_that_holds_the_recorded_use() -> None:
    unused = RingUse()
    used = RingUse(tasks=8, heap_bytes=5 * 1024, heap_largest=1024, heap_allocated=5 * 1024, dep_entries=9)
    once = RingUse(tasks=7, heap_bytes=4096, heap_largest=4096, heap_allocated=99 * 4096, dep_entries=3)
    wraps = RingUse(tasks=3, heap_bytes=4096, heap_largest=2048, heap_allocated=99 * 2048)
    request = suggest_rings([unused, used, once, wraps])
    assert request.ring_task_window == (4, 16, 8, 4)
    assert request.ring_heap == (1024, 8192, 4096, 8192)
    assert request.ring_dep_pool == (4, 9, 4, 4)
    with pytest.raises(ConfigError, match="1 rings"):
        suggest_rings([unused])


@pytest.mark.guarantee("G5")
def test_sizes_larger_than_the_free_memory_are_refused_with_both_numbers_and_what_to_make_smaller() -> None:
    sizes = RingSizes(heap=(1 << 34,) * 4)
    assert sizes.reserved_bytes > 4 << 34
    check_reservation(sizes, sizes.reserved_bytes * 2, chips=2)
    with pytest.raises(MemoryExhausted) as caught:
        check_reservation(sizes, sizes.reserved_bytes * 2 - 1, chips=2)
    assert caught.value.code == 207001
    for part in (f"{sizes.reserved_bytes * 2:,}", f"{sizes.reserved_bytes * 2 - 1:,}", "ring_heap", "2 chips"):
        assert part in str(caught.value)
    small = RingSizes(heap=(1024,) * 4, task_window=(1 << 20,) * 4)
    with pytest.raises(MemoryExhausted, match="ring_task_window takes"):
        check_reservation(small, 0, chips=1)
