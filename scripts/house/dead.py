# SPDX-License-Identifier: Apache-2.0
"""What a kernel's text defines and its kernel function never comes to."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from scripts.house.cpp import Item, includes, parse

DeadKind = Literal["function", "member", "enumerator", "constant", "type"]

_KINDS: dict[str, DeadKind] = {"function": "function", "type": "type", "enum": "enumerator", "constant": "constant"}


class Dead(NamedTuple):
    kind: DeadKind
    name: str
    line: int


def dead(text: str, headers: Mapping[str, str]) -> list[Dead]:
    """What is never used, also by way of the headers: from the kernel, from assertions and from directives.

    Args:
        headers: text of every header by its name in `#include <...>`; unknown ones are taken to use nothing.
    """
    items = parse(text)
    reached, alive = _reach(items, _parsed(includes(text), headers))
    found = [
        Dead(_KINDS[item.kind], name, line)
        for item in items
        if item.kind in _KINDS
        for name, line in item.names.items()
        if name not in alive
    ]
    found += [Dead("constant", *local) for item in items for local in item.local_constants.items()]
    return sorted(found + _unread_members(items, reached), key=lambda each: each.line)


def _reach(items: list[Item], others: list[Item]) -> tuple[list[Item], set[str]]:
    """The items that are used, and every name that they mention; overloads and specializations count as one."""
    by_name: dict[str, list[Item]] = {}
    for item in (*items, *others):
        for name in item.names:
            by_name.setdefault(name, []).append(item)
    reached = [item for item in items if item.kind in ("kernel", "assert", "other")]
    seen = {id(item) for item in reached}
    alive: set[str] = set()
    for item in reached:  # grows meanwhile
        for name in item.uses - alive:
            alive.add(name)
            new = [other for other in by_name.get(name, ()) if id(other) not in seen]
            seen.update(map(id, new))
            reached.extend(new)
    return reached, alive


def _unread_members(items: Iterable[Item], reached: list[Item]) -> list[Dead]:
    variables = {"Params"}.union(*(item.params for item in reached))
    read = {member for item in reached for variable, member in item.read if variable in variables}
    members = [member for item in items for member in item.members.items()]
    return [Dead("member", name, line) for name, line in members if name not in read]


def _parsed(names: Iterable[str], headers: Mapping[str, str]) -> list[Item]:
    """The items of these headers and of what they include."""
    wanted = list(names)
    found: list[Item] = []
    for name in wanted:  # grows meanwhile
        if name in headers:
            items, more = _header(headers[name])
            found += items
            wanted += [other for other in more if other not in wanted]
    return found


@functools.cache
def _header(text: str) -> tuple[list[Item], list[str]]:
    return parse(text), includes(text)
