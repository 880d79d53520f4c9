"""Finds out from a chat template's syntax tree what it can be given: content as text or as parts, strings, None.

Follows names from `messages` to a message to its content through assignments, loops and macro arguments, without regard
to scopes: a template that reuses a name for something else may be judged wrongly, which the tests of the field's
templates do not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jinja2 import nodes

ContentFormat = Literal["string", "openai"]
_Names = dict[str, set[str]]  # name → which of "messages", "message", "content" it may stand for


@dataclass(frozen=True, slots=True)
class TemplateInput:
    """content_format "openai": the template loops over a list of parts; "string": it writes content as it is.

    takes_strings: it also asks whether content is a string. takes_none: it asks whether content is none.
    """

    content_format: ContentFormat
    takes_strings: bool
    takes_none: bool


def inspect_template(tree: nodes.Template) -> TemplateInput:
    """What the template with this syntax tree can be given."""
    names = _follow(tree)
    loops = any("content" in _roles(loop.iter, names) for loop in tree.find_all(nodes.For))
    asked = {test.name for test in tree.find_all(nodes.Test) if "content" in _roles(test.node, names)}
    return TemplateInput(
        content_format="openai" if loops else "string",
        takes_strings=not loops or "string" in asked,
        takes_none="none" in asked or "None" in asked,
    )


def _follow(tree: nodes.Template) -> _Names:
    """Names and their roles, repeated until nothing new is learnt: an alias may stand before what it stands for."""
    names: _Names = {"messages": {"messages"}}
    size = -1
    while size != (size := sum(map(len, names.values()))):
        for name, roles in _bindings(tree, names):
            if roles:
                names.setdefault(name, set()).update(roles)
    return names


def _bindings(tree: nodes.Template, names: _Names) -> Iterator[tuple[str, set[str]]]:
    for assign in tree.find_all(nodes.Assign):
        if key := _key(assign.target):
            yield key, _roles(assign.node, names)
    for loop in tree.find_all(nodes.For):
        if (key := _key(loop.target)) and "messages" in _roles(loop.iter, names):
            yield key, {"message"}
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and (macro := macros.get(call.node.name)):
            for parameter, argument in zip(macro.args, call.args, strict=False):
                yield parameter.name, _roles(argument, names)
            for keyword in call.kwargs:
                yield keyword.key, _roles(keyword.value, names)


def _key(node: nodes.Node) -> str | None:
    """A variable, or an attribute of a namespace, as a name."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return f"{node.node.name}.{node.attr}"
    return None


def _roles(node: nodes.Node | None, names: _Names) -> set[str]:
    """What the expression may stand for."""
    if node is None:
        return set()
    if isinstance(node, nodes.CondExpr):
        return _roles(node.expr1, names) | _roles(node.expr2, names)
    if isinstance(node, nodes.Filter):
        inner = _roles(node.node, names)
        return {"message"} if node.name in ("first", "last") and "messages" in inner else inner
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _roles(node.node, names)
    found = set(names.get(_key(node) or "", ()))
    if isinstance(node, (nodes.Getitem, nodes.Getattr)):
        owner = _roles(node.node, names)
        member = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
        if "message" in owner and member == "content":
            found.add("content")
        if "messages" in owner and isinstance(node, nodes.Getitem):
            found.add("message")
    return found
