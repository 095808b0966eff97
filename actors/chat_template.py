"""A model's chat template: a program of the model's author, run in a sandbox and never for ever.

Owns: the steps of the rendering under way. What templates may use is what transformers gives them: ``tojson``,
``raise_exception``, ``strftime_now``, ``{% generation %}``, ``{% break %}``; no attribute of Python's own is reachable
and nothing given to a template can be changed by it.

What bounds a rendering: ``MAX_STEPS`` turns of loops, macros and blocks, ``MAX_CHARACTERS`` of text, ``MAX_MEMORY``
for all that its expressions make, and the sandbox's own limit of 100,000 numbers in a range. A single step may still
take long; for that there is the supervisor, which replaces a tokenizer that is stuck, and the limit on how often a
request may cost one.
"""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["ChatTemplate"]

MAX_STEPS = 100_000  # 0.3 s of a Zen 4 core if they do nothing; the longest conversations take a few steps a message
MAX_CHARACTERS = 1 << 26
MAX_MEMORY = 1 << 30  # bytes beyond what the process has: the longest text, four bytes a character, three times


class ChatTemplate:
    """One template, compiled."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """``special_tokens``: ``bos_token``, … as the template may name them. Raises ``jinja2.TemplateError``."""
        self._environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        with _memory_for(MAX_MEMORY):  # constant expressions are computed here; what does not fit is left for later
            self._template = self._environment.from_string(source)
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation, ready for the model's next turn, without tools. Raises whatever the template raises."""
        self._environment.steps = 0
        try:
            with _memory_for(MAX_MEMORY):
                return self._render(messages)
        except MemoryError:
            raise jinja2.TemplateRuntimeError(f"it needed more than {MAX_MEMORY >> 20} MiB of memory") from None

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        pieces, length = [], 0
        for piece in self._template.generate(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
        ):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise jinja2.TemplateRuntimeError(f"it wrote more than {MAX_CHARACTERS} characters")
        return "".join(pieces)


@contextlib.contextmanager
def _memory_for(num_bytes: int) -> Iterator[None]:
    """For so long, nobody in this process gets more memory than that: ``MemoryError``. A tokenizer has one thread of
    Python, and the other, ZeroMQ's, needs hardly any.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    data_pages = int(Path("/proc/self/statm").read_text().split()[5])  # proc(5); what the limit counts, and stacks
    limit = data_pages * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with what templates expect of it, and a step counted wherever one could go round and round."""

    steps = 0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _generate(self, source: nodes.Template, *rest: Any, **more: Any) -> str:
        for statement in list(source.find_all(nodes.Stmt)):
            if isinstance(statement, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
                step = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
                statement.body.insert(0, nodes.ExprStmt(step, lineno=statement.lineno))
        return super()._generate(source, *rest, **more)

    def count_step(self) -> None:
        """Called by the compiled template at the begin of each turn of a loop, of each macro and of each block."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise jinja2.TemplateRuntimeError(f"it took more than {MAX_STEPS} steps")


class _Generation(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}`` marks what an assistant said, for training; here it is just text."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; templates expect plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    """Local time, as templates write it into system messages."""
    return datetime.now().strftime(form)
