"""What a chat template looks at: whether it writes a chat message by message, told from its syntax tree alone.

Where it does, the text of the first k messages is the beginning of the text of all of them, and each message's part
is found from two messages instead of from all before it: a chat of n messages costs n short renderings, not n long
ones. Whatever is not known to be harmless makes the answer no.
"""

from __future__ import annotations

from jinja2 import Environment, TemplateSyntaxError, nodes

_HARMLESS = (
    nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.Getattr, nodes.Getitem, nodes.If, nodes.CondExpr,
    nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Add, nodes.Concat, nodes.Filter, nodes.Test,
)  # fmt: skip
_FILTERS = ("trim", "capitalize", "upper", "lower", "title", "string", "length", "replace", "default")
_environment = Environment(trim_blocks=True, lstrip_blocks=True)


def writes_by_message(template: str) -> bool:
    """Whether the template's text is, whatever the messages: a head, a part for each message, an invitation to answer.

    The head may depend on the first message, a part on its own message, on the first one, and on whether it is the
    first; the invitation is asked for by `add_generation_prompt` and may depend on the first message.
    """
    try:
        body = _environment.parse(template).body
    except TemplateSyntaxError:
        return False
    loops = [number for number, node in enumerate(body) if isinstance(node, nodes.For)]
    if len(loops) != 1:
        return False
    [at] = loops
    loop = body[at]
    return (
        isinstance(loop, nodes.For)
        and _is_plain(loop)
        and all(_is_harmless(node, in_loop=False) for node in body[:at])
        and all(_is_harmless(node, in_loop=True) for node in loop.body)
        and all(_invites(node) for node in body[at + 1 :])
    )


def _is_plain(loop: nodes.For) -> bool:
    over_messages = isinstance(loop.iter, nodes.Name) and loop.iter.name == "messages"
    own_name = isinstance(loop.target, nodes.Name) and loop.target.name not in ("messages", "add_generation_prompt")
    return over_messages and own_name and not (loop.else_ or loop.test or loop.recursive)


def _invites(node: nodes.Node) -> bool:
    """`{% if add_generation_prompt %}…{% endif %}`."""
    return (
        isinstance(node, nodes.If)
        and _is_name(node.test, "add_generation_prompt")
        and not (node.elif_ or node.else_)
        and all(_is_harmless(inner, in_loop=False) for inner in node.body)
    )


def _is_harmless(node: nodes.Node, *, in_loop: bool) -> bool:
    """Whether a node sees nothing but its own message, the first one, and what is the same in every chat."""
    if _is_first(node):
        return True
    if not isinstance(node, _HARMLESS) or (isinstance(node, nodes.Filter) and node.name not in _FILTERS):
        return False
    if isinstance(node, nodes.Name):
        return node.name not in ("messages", "loop", "add_generation_prompt")
    if isinstance(node, (nodes.Getattr, nodes.Getitem)) and _is_name(node.node, "loop"):
        return in_loop and isinstance(node, nodes.Getattr) and node.attr == "first"
    return all(_is_harmless(child, in_loop=in_loop) for child in node.iter_child_nodes())


def _is_first(node: nodes.Node) -> bool:
    """`messages[0]`."""
    return (
        isinstance(node, nodes.Getitem)
        and _is_name(node.node, "messages")
        and isinstance(node.arg, nodes.Const)
        and node.arg.value == 0
        and type(node.arg.value) is int
    )


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name
