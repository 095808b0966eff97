"""Layer spans: the grammar, the forms a split may take, and what a model adds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipbus.errors import TopologyError
from chipbus.topology import LayerSpan, LayerSplit


@pytest.mark.parametrize(
    ("text", "kind", "remote"),
    [
        ("0:output", "local", None),
        ("0:19", "forward", (20, 42)),
        ("20:output", "reverse", (0, 19)),
        ("0:19,30:output", "sandwich", (20, 29)),
        (" 0:19 , 30:output ", "sandwich", (20, 29)),
    ],
)
def test_every_legal_form_is_recognised_with_the_layers_it_leaves_to_others(text, kind, remote):
    split = LayerSplit.parse(text)
    split.check(43)
    assert (split.kind, split.remote(43)) == (kind, remote)


def test_touching_sandwich_spans_leave_nothing_elsewhere_and_are_local():
    assert LayerSplit.parse("0:19,20:output") == LayerSplit.parse("0:output")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "exactly one ':'"),
        ("7", "exactly one ':'"),
        ("0:1:2", "exactly one ':'"),
        (":5", "starts at ''"),
        ("-1:5", "starts at '-1'"),
        ("01:5", "starts at '01'"),
        ("x:5", "starts at 'x'"),
        ("0:", "ends at ''"),
        ("0:head", "ends at 'head'"),
        ("0:1.5", "ends at '1.5'"),
        ("9:3", "ends at 3 before it starts at 9"),
        ("5:10", "use 0:10 or 5:output"),
        ("20:42", "or 20:output"),
        ("0:3,5:7,9:output", "3 spans"),
        ("1:3,5:output", "must be 0:A"),
        ("0:output,5:output", "must be 0:A"),
        ("0:3,5:9", "use 5:output"),
        ("0:5,5:output", "overlap"),
        ("0:5,3:output", "overlap"),
    ],
)
def test_a_wrong_span_is_refused_with_the_value_and_the_rule(text, says):
    with pytest.raises(TopologyError, match="layers") as caught:
        LayerSplit.parse(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "num_layers", "says"),
    [
        ("43:output", 43, "starts at layer 43; the model's last layer is 42"),
        ("0:43", 43, "ends at layer 43; the model's last layer is 42"),
        ("0:42", 43, "use 0:output"),
        ("0:1", 0, "reports 0 layers"),
        ("0:9,50:output", 43, "starts at layer 50"),
    ],
)
def test_a_split_that_does_not_fit_the_model_is_refused(text, num_layers, says):
    split = LayerSplit.parse(text)
    with pytest.raises(TopologyError) as caught:
        split.check(num_layers)
    assert says in str(caught.value)


@given(st.integers(1, 60), st.data())
@settings(max_examples=150, deadline=None, print_blob=True)
def test_owned_and_remote_layers_together_are_every_layer_once(num_layers, data):
    start = data.draw(st.integers(0, num_layers - 1))
    end = data.draw(st.none() | st.integers(start, num_layers - 1))
    second = data.draw(st.none() | st.integers(0, num_layers - 1))
    text = f"{start}:{'output' if end is None else end}" + ("" if second is None else f",{second}:output")
    try:
        split = LayerSplit.parse(text)
        split.check(num_layers)
    except TopologyError:
        return
    owned = [n for s in split.spans for n in range(s.start, num_layers if s.end is None else s.end + 1)]
    remote = split.remote(num_layers)
    others = [] if remote is None else list(range(remote[0], remote[1] + 1))
    assert sorted(owned + others) == list(range(num_layers))
    assert (split.kind == "local") == (not others)
    assert LayerSplit.parse(str(split)) == split


def test_a_span_prints_as_it_is_written():
    assert [str(LayerSpan.parse(text)) for text in ("0:14", "14:output")] == ["0:14", "14:output"]
