"""A user's jinja templates and filters, run in a sandbox, with mistakes explained in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune_api.report import FailureClass
from finetune_api.structure import near_match
from finetune_trainer.data.limits import within_limits
from finetune_trainer.failures import TrainerError

Render = Callable[[Mapping[str, Any]], str]

FIELD = "datasets"
"""The field of templates and filters."""

_environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)


class TemplateRowError(ValueError):
    """The template fails on this row; the message says why."""


@lru_cache(maxsize=64)
def compile_template(source: str) -> Render:
    """A function from a row's variables to text. It raises TemplateRowError where the row does not fit.

    Raises jinja2.TemplateSyntaxError where the template is none, TrainerError (bad-spec) where it needs too much.
    """
    what = f"The template {_shortened(source)!r}"
    # Constant expressions are computed at once.
    template = within_limits(lambda: _environment.from_string(source), what, FIELD)

    def render(variables: Mapping[str, Any]) -> str:
        try:
            return within_limits(lambda: template.render(variables), what, FIELD)
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise TemplateRowError(_first_line(error)) from error

    return render


@lru_cache(maxsize=64)
def compile_filter(source: str) -> Callable[[Mapping[str, Any]], bool]:
    """A function from a row's columns to whether the row is kept, from a jinja expression.

    Raises jinja2.TemplateSyntaxError where it is no expression, TrainerError (bad-spec) where it needs too much.
    """
    what = f"The filter {_shortened(source)!r}"
    compiled = within_limits(lambda: _environment.compile_expression(source, undefined_to_none=False), what, FIELD)

    def keep(variables: Mapping[str, Any]) -> bool:
        try:
            named = {str(name): value for name, value in variables.items()}
            value = within_limits(lambda: compiled(**named), what, FIELD)
            if isinstance(value, StrictUndefined):
                raise UndefinedError(str(value._undefined_message))
            return bool(value)
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise TemplateRowError(_first_line(error)) from error

    return keep


def check_template(source: str, known: Sequence[str], field: str, *, expression: bool = False) -> None:
    """Raise TrainerError (bad-spec) where `source` is not jinja or names something that is not in `known`."""
    kind = "expression" if expression else "template"
    try:
        whole = "{{ (" + source + ") }}" if expression else source
        tree = within_limits(lambda: _environment.parse(whole), f"The {kind}", field)
        (compile_filter if expression else compile_template)(source)
    except TemplateSyntaxError as error:
        sentence = f"Not a valid Jinja {kind}: {error.message} (line {error.lineno})."
        raise TrainerError(FailureClass.BAD_SPEC, sentence, field) from error
    for name in sorted(meta.find_undeclared_variables(tree) - {str(given) for given in known}):
        raise TrainerError(
            FailureClass.BAD_SPEC,
            f"The {kind} uses {name!r}, which is not a column of the dataset.{near_match(name, list(known))} "
            f"Available: {', '.join(sorted(known))}.",
            field,
        )


def _shortened(source: str) -> str:
    return source if len(source) <= 80 else f"{source[:80]}…"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
