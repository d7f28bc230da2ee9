"""Chat templates: programs that come with a model, run in a sandbox with limits.

They render what transformers renders: the same names are defined (``tools`` and ``documents`` are None if
not given), the same filters and globals exist, and messages come as plain data.

Jinja's immutable sandbox refuses attribute escapes and changes to its arguments. It does not limit time or size, so
loops, string operations, filters and calls are counted here as well. What is *not* defended: a template may still print
something misleading, which is why its output is only ever tokenized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from dspark_runtime.errors import ChatTemplateError
from dspark_runtime.text.template_data import plain_messages, plain_variables
from dspark_runtime.text.template_formats import bounded_format, check_percent, to_json
from dspark_runtime.text.template_limits import Budget, TemplateLimits

Message = Mapping[str, object]


class ChatTemplate:
    """One compiled template.

    Args:
        source: the Jinja text.
        variables: what templates expect beside the messages, such as ``bos_token`` and ``eos_token``.
        limits: bounds of each rendering.

    Raises:
        ChatTemplateError: the template is too large or malformed.
    """

    def __init__(
        self, source: str, variables: Mapping[str, Any] | None = None, limits: TemplateLimits | None = None
    ) -> None:
        self._limits = limits or TemplateLimits()
        self._variables = dict(variables or {})
        if len(source) > self._limits.template_chars:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters; at most {self._limits.template_chars} are read"
            )
        self._environment = _Environment(self._limits)
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise ChatTemplateError(f"the chat template is malformed: {error}") from error

    def render(self, messages: Sequence[Message], /, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as one text.

        ``variables`` are the template's own, such as ``tools``, ``documents`` or ``enable_thinking``; they replace
        those of the constructor. Raises UsageError for messages that are not mappings, ChatTemplateError where the
        template fails or exceeds a limit.
        """
        budget = self._environment.budget = Budget(self._limits)
        given = plain_variables({"tools": None, "documents": None, **self._variables, **variables})
        context = {**given, "messages": plain_messages(messages), "add_generation_prompt": add_generation_prompt}
        pieces, size = [], 0
        try:
            for piece in self._template.generate(context):
                pieces.append(piece)
                size += len(piece)
                budget.check_size(size)
        except ChatTemplateError:
            raise
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template failed: {error}") from error
        except RecursionError as error:
            raise ChatTemplateError("the chat template calls itself without end") from error
        except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError, AttributeError) as error:
            raise ChatTemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error
        return "".join(pieces)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with every operation that can grow or repeat going through the budget."""

    intercepted_binops = frozenset(["+", "*", "**", "%", "//", "-", "/"])
    intercepted_unops = frozenset()

    def __init__(self, limits: TemplateLimits) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock])
        self.budget = Budget(limits)
        self._limits = limits
        self.filters = {name: self._guarded(function) for name, function in self.filters.items()}
        self.filters["tojson"] = self._guarded(self._tojson)
        # Filters that see the context are never computed while compiling.
        for name in ("counted", "joined", "emitted", "built"):
            self.filters[f"_{name}"] = getattr(self, f"_{name}")
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _TemplateDict()
        self.globals["namespace"] = _TemplateNamespace
        self.globals.pop("lipsum", None)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in list(template.find_all(nodes.For)):
            loop.iter = _through("_counted", loop.iter)
        for joined in list(template.find_all(nodes.Concat)):  # `a ~ b` is not an operator to the sandbox
            joined.nodes = [_through("_joined", nodes.List(joined.nodes, lineno=joined.lineno))]
        for output in list(template.find_all(nodes.Output)):
            output.nodes = [_through("_emitted", _as_expression(node)) for node in output.nodes]
        for build in list(template.find_all((nodes.Assign, nodes.Call, nodes.Filter, nodes.Compare))):
            _guard_displays(build)
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.turn()
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                if isinstance(text, str | bytes | list | tuple) and isinstance(count, int):
                    self.budget.check_size(len(text) * count)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.budget.check_size(left.bit_length() * max(right, 0))
        if operator == "%" and isinstance(left, str | bytes):
            check_percent(left, right, self.budget)
        return self.budget.check(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Guard one call; the odd names leave all others to the template's keyword arguments."""
        __self.budget.turn()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes):
            __self._check_text_call(owner, __obj.__name__, args, kwargs)
        return __self.budget.check(super().call(__context, __obj, *args, **kwargs))

    def _check_text_call(self, owner: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                self.budget.check_size(abs(value))
        if name == "expandtabs":
            self.budget.check_size(len(owner) * max([8, *(abs(v) for v in args if isinstance(v, int))]))
        if name == "replace" and len(args) >= 2 and all(isinstance(text, str | bytes) for text in args[:2]):
            self.budget.check_size(len(owner) + (len(owner) + 1) * len(args[1]) // max(1, len(args[0])))
        if name == "join" and args and isinstance(args[0], str | list | tuple):
            self.budget.check_size(len(owner) * len(args[0]))

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.turn()
            values = [v for v in (*args, *kwargs.values())]
            for value in values:
                if isinstance(value, int) and not isinstance(value, bool) and function in _SIZED:
                    self.budget.check_size(abs(value))
            if function is _REPLACE:
                texts = [v for v in values if isinstance(v, str)]
                if len(texts) >= 3:
                    self.budget.check_size(len(texts[0]) + (len(texts[0]) + 1) * len(texts[2]) // max(1, len(texts[1])))
            if function is _FORMAT:
                check_percent(str(args[0]), kwargs or args[1:], self.budget)
            return self.budget.check(function(*args, **kwargs))

        for mark in ("jinja_pass_arg",):  # which of context, environment and eval_ctx the filter is handed first
            if hasattr(function, mark):
                setattr(guarded, mark, getattr(function, mark))
        return guarded

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """In place of ``format`` and ``format_map`` of a text; None for every other value."""
        if isinstance(getattr(value, "__self__", None), str) and value.__name__ in ("format", "format_map"):
            return bounded_format(self, self.budget, value)
        return None

    def _tojson(self, value: Any, *args: Any, **kwargs: Any) -> str:
        return to_json(self.budget, value, *args, **kwargs)

    @jinja2.pass_context
    def _counted(self, _: Any, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.budget.turn()
            yield value

    @jinja2.pass_context
    def _joined(self, _: Any, values: Sequence[Any]) -> str:
        self.budget.turn()
        self.budget.check(values)
        return str(self.budget.check("".join(str(value) for value in values)))

    @jinja2.pass_context
    def _emitted(self, _: Any, value: Any) -> Any:
        self.budget.check(value)
        text = value if isinstance(value, str | jinja2.Undefined) else str(value)
        self.budget.emit(len(text) if isinstance(text, str) else 0)
        return text

    @jinja2.pass_context
    def _built(self, _: Any, value: Any) -> Any:
        return self.budget.check(value)


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _as_expression(node: nodes.Expr) -> nodes.Expr:
    return nodes.Const(node.data, lineno=node.lineno) if isinstance(node, nodes.TemplateData) else node


def _guard_displays(node: nodes.Node) -> None:
    """Have lists, tuples and dicts that ``node`` builds from variables weighed as they are made."""
    for field, value in list(node.iter_fields()):
        display = isinstance(value, nodes.List | nodes.Dict | nodes.Tuple) and getattr(value, "ctx", "load") == "load"
        if display and value.find(nodes.Name) is not None:
            setattr(node, field, _through("_built", value))


_DEFAULTS = FILTERS
_SIZED = frozenset(_DEFAULTS[name] for name in ("center", "indent", "wordwrap", "truncate", "batch", "slice", "round"))
_REPLACE, _FORMAT = _DEFAULTS["replace"], _DEFAULTS["format"]


class _GenerationBlock(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks what an assistant wrote; for rendering it is plain content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _TemplateDict:
    """``dict`` of a template: what it may call, and not the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As ``dict.fromkeys``."""
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """``namespace`` of a template; names with an underscore in front are refused, as transformers does."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805, RUF100
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise ChatTemplateError(f"the chat template sets {name!r} on a namespace; names must not begin with _")


def _raise_exception(message: str) -> None:
    raise ChatTemplateError(f"the chat template refuses this conversation: {message}")


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern[:200])
