"""Prompt templates of versions: a small part of Jinja that cannot read attributes, loop or grow.

Only the listed nodes are compiled. Without loops, calls, attributes and arithmetic, the output is at most the
template with the text in each of its bounded number of places.
"""

from __future__ import annotations

from functools import lru_cache

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

VARIABLE = "text"
"""The only variable of a template."""

MAX_USES = 16
"""How often a template may use its variable."""

MAX_NODES = 512
"""Parts of a template: expressions, conditions and literal texts."""

MAX_OUTPUT_CHARS = 4_000_000

FILTERS = frozenset({"capitalize", "lower", "trim", "upper"})
TESTS = frozenset({"lower", "upper"})

_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.Concat),
    *(nodes.If, nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.Not, nodes.And, nodes.Or),
    *(nodes.Filter, nodes.Test),
)

_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, cache_size=0
)


def check_template(source: str) -> None:
    """Check that a template can be compiled and uses nothing but its variable.

    Raises:
        ValueError: If it cannot, does, or does not contain the variable.
    """
    _compiled(source)


def render(source: str, text: str) -> str:
    """The template with a text.

    Raises:
        ValueError: If ``check_template`` would refuse it, or it cannot be rendered.
    """
    template, uses = _compiled(source)
    if len(source) + uses * len(text) > MAX_OUTPUT_CHARS:
        raise ValueError(f"the text is too long: the template would write over {MAX_OUTPUT_CHARS} characters")
    try:
        return template.render({VARIABLE: text})
    except TemplateError as error:
        raise ValueError(f"the template cannot be rendered: {error}") from error


@lru_cache(maxsize=256)
def _compiled(source: str) -> tuple[Template, int]:
    """A template, and how often it uses its variable."""
    try:
        tree = _ENVIRONMENT.parse(source)
        parts = [tree, *tree.find_all(nodes.Node)]
        if len(parts) > MAX_NODES:
            raise ValueError(f"it has {len(parts)} parts; at most {MAX_NODES}")
        uses = 0
        for node in parts:
            if not isinstance(node, _NODES):
                raise ValueError(
                    f"line {node.lineno}: {type(node).__name__} is not allowed: a template has {{{{ {VARIABLE} }}}}, "
                    f"text, conditions and the filters {', '.join(sorted(FILTERS))}"
                )
            if isinstance(node, nodes.Name):
                _check_name(node)
                uses += 1
            elif isinstance(node, nodes.Filter | nodes.Test):
                _check_filter(node)
        if not uses:
            raise ValueError(f"it does not contain {{{{ {VARIABLE} }}}}")
        if uses > MAX_USES:
            raise ValueError(f"it uses {VARIABLE} {uses} times; at most {MAX_USES}")
        return _ENVIRONMENT.from_string(tree), uses
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno}: {error.message}") from error
    except (TemplateError, RecursionError, SyntaxError) as error:  # deep nesting fails in Python's own compiler
        raise ValueError(f"it cannot be compiled: {error}") from error


def _check_name(node: nodes.Name) -> None:
    if node.name != VARIABLE or node.ctx != "load":
        raise ValueError(f"line {node.lineno}: {node.name[:64]!r} is not known: the only variable is {VARIABLE}")


def _check_filter(node: nodes.Filter | nodes.Test) -> None:
    known = FILTERS if isinstance(node, nodes.Filter) else TESTS
    if node.name not in known or node.args or node.kwargs or node.dyn_args or node.dyn_kwargs:
        which = ", ".join(sorted(known))
        raise ValueError(f"line {node.lineno}: {node.name[:64]!r} is not allowed: {which} without arguments are")
