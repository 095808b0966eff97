"""A model's chat template: a program of the model's author, run in a sandbox and never for ever.

Owns: the steps of the rendering under way. What templates may use is what transformers gives them: ``tojson``,
``raise_exception``, ``strftime_now``, ``{% generation %}``, ``{% break %}``; no attribute of Python's own is reachable
and nothing given to a template can be changed by it.

What bounds a rendering: ``MAX_STEPS`` turns of loops, macros and blocks, ``MAX_CHARACTERS`` of text, the sandbox's own
limit of 100,000 numbers in a range, and ``MAX_MADE`` characters that all its expressions make together, each charged
before it makes them (``template_costs``). What is still slow is left to the supervisor, which replaces a tokenizer that
is stuck or dead, and to the limit on how often a request may cost one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes, pass_eval_context
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from .template_costs import FILTERS, PASSIVE, cost_of, of_binary, of_format, of_method, text_size

__all__ = ["ChatTemplate"]

MAX_STEPS = 100_000  # 0.3 s of a Zen 4 core if they do nothing; the longest conversations take a few steps a message
MAX_CHARACTERS = 1 << 26
MAX_MADE = 1 << 28  # of a conversation of a megabyte, all that may be put together again after each of 250 messages

_COMPILERS_OWN = ("_loop_vars", "_block_vars")  # which compiled templates give with every call, to the context


class ChatTemplate:
    """One template, compiled."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """``special_tokens``: ``bos_token``, … as the template may name them. Raises ``jinja2.TemplateError``."""
        self._environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self._template = self._environment.from_string(source)
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation, ready for the model's next turn, without tools. Raises whatever the template raises."""
        self._environment.steps = self._environment.made = 0
        pieces, length = [], 0
        for piece in self._template.generate(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
        ):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise jinja2.TemplateRuntimeError(f"it wrote more than {MAX_CHARACTERS} characters")
        return "".join(pieces)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with what templates expect of it, a step counted wherever one could go round and round, and all
    that expressions make charged before it is made.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        # Nothing is computed when a template is compiled: what came of it would not be charged when it is used.
        super().__init__(optimized=False, finalize=self._finalized, **options)
        self.steps = self.made = 0
        self.filters["tojson"] = _to_json
        self.filters = {
            name: self._charged(name, function) for name, function in self.filters.items() if name in FILTERS
        } | {name: function for name, function in self.filters.items() if name in PASSIVE}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]  # random words are nothing a conversation is made of

    def _generate(self, source: nodes.Template, *rest: Any, **more: Any) -> str:
        source = _Rewrite().visit(source)
        for statement in list(source.find_all(nodes.Stmt)):
            if isinstance(statement, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
                texts = sum(len(data.data) for part in statement.body for data in part.find_all(nodes.TemplateData))
                step = _own("count_step", [nodes.Const(texts)])
                statement.body.insert(0, nodes.ExprStmt(step, lineno=statement.lineno))
        return super()._generate(source, *rest, **more)

    # What compiled templates call.

    def count_step(self, characters: int) -> None:
        """Called at the begin of each turn of a loop, macro and block, with the length of the text in it."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise jinja2.TemplateRuntimeError(f"it took more than {MAX_STEPS} steps")
        self._make(characters)

    @pass_eval_context
    def join_text(self, context: EvalContext, *parts: Any) -> str:
        """``a ~ b ~ c``."""
        self._make((6 if context.autoescape else 1) * sum(map(text_size, parts)))
        return (markup_join if context.autoescape else str_join)(parts)

    def slice_of(self, value: Any, *bounds: Any) -> Any:
        """``value[start:stop:step]``."""
        part = value[slice(*bounds)]
        self._make(cost_of(part))
        return part

    def spread(self, values: Any) -> Any:
        """``*values`` of a call."""
        self._make(64 * len(values) if isinstance(values, str) else cost_of(values))
        return values

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """What is intercepted of operators."""
        self._make(of_binary(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Everything that is called."""
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str | bytes | int):
            if function.__name__ == "join":
                args = tuple(map(_at_hand, args))
            named = {name: value for name, value in kwargs.items() if name not in _COMPILERS_OWN}
            self._make(of_method(owner, function.__name__, *args, **named))
        made = super().call(context, function, *args, **kwargs)
        if isinstance(made, list | dict):
            self._make(cost_of(made))
        return made

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` and ``str.format_map``, which are not called by ``call`` everywhere."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        def charged(*args: Any, **kwargs: Any) -> str:
            self._make(of_format(value.__self__, [*args, *kwargs.values()]))
            return safe(*args, **kwargs)

        return charged

    @pass_eval_context
    def _finalized(self, context: EvalContext, value: Any) -> Any:
        """What ``{{ … }}`` writes, be it to the end of the text or into a variable."""
        self._make((6 if context.autoescape else 1) * text_size(value))
        return value

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is charged for."""
        own = int(hasattr(function, "jinja_pass_arg"))  # a context comes first
        estimate, consumes = FILTERS[name], name in ("join", "sum")

        @wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            if consumes and len(args) > own:
                args = (*args[:own], _at_hand(args[own]), *args[own + 1 :])
            self._make(estimate(*args[own:], **kwargs))
            made = function(*args, **kwargs)
            if isinstance(made, list):
                self._make(cost_of(made))
            return made

        return charged

    def _make(self, units: int) -> None:
        """Charge what is about to be made."""
        self.made += units
        if self.made > MAX_MADE:
            raise jinja2.TemplateRuntimeError(f"its expressions made more than {MAX_MADE} characters")


class _Rewrite(NodeTransformer):
    """Has what the sandbox does not intercept done by the environment."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        """Children first."""
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.Concat):
            return _own("join_text", node.nodes)
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            bounds = (node.arg.start, node.arg.stop, node.arg.step)
            return _own("slice_of", [node.node, *(bound or nodes.Const(None) for bound in bounds)])
        if isinstance(node, nodes.Call | nodes.Filter | nodes.Test) and node.dyn_args is not None:
            node.dyn_args = _own("spread", [node.dyn_args])
        return node


def _own(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    """A call of the environment's method of that name."""
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


def _at_hand(values: Any) -> Any:
    """What comes one by one, as a list."""
    return values if hasattr(values, "__len__") else list(values)


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
