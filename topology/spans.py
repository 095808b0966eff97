"""Layer spans: which layers of a model the near side owns, in the grammar ``A:B``, ``A:output``, ``0:A,B:output``.

Owns: nothing; values only. Layers count from 0 and both ends of a span are inclusive; ``output`` means up to the last
layer and the output head (final norm and LM head).
"""

from __future__ import annotations

import re

import attrs

from ..errors import TopologyError

__all__ = ["LayerSpan", "LayerSplit"]

_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


@attrs.frozen
class LayerSpan:
    """Layers ``start`` to ``end`` inclusive; ``end`` is None for up to the last layer and the output head."""

    start: int
    end: int | None

    @classmethod
    def parse(cls, text: str) -> LayerSpan:
        """``0:14`` or ``14:output``. Raises ``TopologyError`` naming the text and the rule it breaks."""
        parts = text.split(":")
        if len(parts) != 2:
            raise TopologyError(f"layers {text!r} is not A:B or A:output; exactly one ':' is needed")
        first, last = parts[0].strip(), parts[1].strip()
        if not _NUMBER.fullmatch(first):
            raise TopologyError(f"layers {text!r} starts at {first!r}; a layer is a whole number from 0")
        if last == "output":
            return cls(int(first), None)
        if not _NUMBER.fullmatch(last):
            raise TopologyError(f"layers {text!r} ends at {last!r}; it must be a layer number or 'output'")
        if int(last) < int(first):
            raise TopologyError(f"layers {text!r} ends at {last} before it starts at {first}")
        return cls(int(first), int(last))

    @property
    def has_head(self) -> bool:
        """Whether the span owns the output head."""
        return self.end is None

    def check(self, num_layers: int) -> None:
        """Raise ``TopologyError`` unless the span lies inside a model of ``num_layers`` layers."""
        if num_layers < 1:
            raise TopologyError(f"the model reports {num_layers} layers; a span needs at least 1")
        for word, layer in (("starts", self.start), ("ends", self.end)):
            if layer is not None and layer >= num_layers:
                raise TopologyError(
                    f"layers {self} {word} at layer {layer}; the model's last layer is {num_layers - 1}"
                )

    def __str__(self) -> str:
        return f"{self.start}:{'output' if self.end is None else self.end}"


@attrs.frozen
class LayerSplit:
    """The one or two spans the near side owns; what lies between or beside them belongs to other stages.

    One span: ``0:output`` (everything), ``0:K`` (forward) or ``K:output`` (reverse). Two: ``0:A,B:output`` (sandwich).
    """

    spans: tuple[LayerSpan, ...]

    @classmethod
    def parse(cls, text: str) -> LayerSplit:
        """Parse and check the form. Raises ``TopologyError`` with the forms that would be right."""
        if not isinstance(text, str):
            raise TopologyError(f"layers is {text!r}; it must be a string such as 0:14 or 14:output")
        spans = tuple(LayerSpan.parse(part.strip()) for part in text.split(","))
        if len(spans) > 2:
            raise TopologyError(f"layers {text!r} has {len(spans)} spans; at most two are possible, as 0:A,B:output")
        if len(spans) == 2:
            return cls(_sandwich(text, *spans))
        span = spans[0]
        if span.start > 0 and span.end is not None:
            raise TopologyError(
                f"layers {text!r} owns neither the first layer nor the output head;"
                f" use 0:{span.end} or {span.start}:output"
            )
        return cls(spans)

    def check(self, num_layers: int) -> None:
        """Raise ``TopologyError`` unless the split fits a model of ``num_layers`` layers."""
        for span in self.spans:
            span.check(num_layers)
        if self.spans == (LayerSpan(0, num_layers - 1),):
            raise TopologyError(f"layers {self} owns every layer but not the output head; use 0:output")

    @property
    def kind(self) -> str:
        """``local`` (nothing elsewhere), ``forward``, ``reverse`` or ``sandwich``."""
        if len(self.spans) == 2:
            return "sandwich"
        if self.spans[0].has_head:
            return "local" if self.spans[0].start == 0 else "reverse"
        return "forward"

    def remote(self, num_layers: int) -> tuple[int, int] | None:
        """First and last layer that other stages own in a model of ``num_layers`` layers; None when there is none."""
        first, last = self.spans[0], self.spans[-1]
        low = 0 if first.end is None else first.end + 1
        high = last.start - 1 if last.has_head else num_layers - 1
        return (low, high) if low <= high else None

    def __str__(self) -> str:
        return ",".join(str(span) for span in self.spans)


def _sandwich(text: str, first: LayerSpan, second: LayerSpan) -> tuple[LayerSpan, ...]:
    """Check ``0:A,B:output``; spans that touch leave nothing elsewhere and become ``0:output``."""
    if first.start != 0 or first.end is None:
        raise TopologyError(f"layers {text!r} begins with {first}; the first of two spans must be 0:A")
    if second.end is not None:
        raise TopologyError(f"layers {text!r} ends with {second}, without output head; use {second.start}:output")
    if second.start <= first.end:
        raise TopologyError(f"layers {text!r} overlap: {first} ends at {first.end}, {second} starts at {second.start}")
    if second.start == first.end + 1:
        return (LayerSpan(0, None),)
    return (first, second)
