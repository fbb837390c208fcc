# SPDX-License-Identifier: Apache-2.0
"""As much of C++ as the kernels need: a text's top-level items, what each defines and which names it uses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

Kind = Literal["kernel", "function", "type", "enum", "constant", "assert", "other"]

_COMMENT_OR_STRING = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\\n])*" | (?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'""", re.DOTALL | re.VERBOSE
)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*[<\"]([^>\"]+)", re.MULTILINE)
_TOKEN = re.compile(r"\n|[A-Za-z_]\w*|\d[\w.']*|->|::|\S")
_NAME = re.compile(r"[A-Za-z_]\w*")
_VARIABLE = re.compile(r"(?!k[A-Z])[a-z]")

_OPEN, _CLOSE = "([{", ")]}"
_WITH_ARGUMENTS = {"__launch_bounds__", "alignas", "__align__", "decltype", "__attribute__"}
_NO_TYPES = {"return", "else", "case", "in", "new", "throw", "co_return", "do"}


class Token(NamedTuple):
    text: str
    line: int


@dataclass(frozen=True)
class Item:
    """One declaration at the top level of a text.

    Attributes:
        names: what it defines, with the line; an enum's are its enumerators.
        uses: the names that it mentions, those of members and of its own template parameters aside.
        members: of `struct Params`, the members with their lines.
        read: (variable, member) of every `variable.member` and `variable->member`.
        params: names of variables of type Params.
        local_constants: constants in its body that are never mentioned again, with the line.
    """

    kind: Kind
    names: dict[str, int]
    uses: frozenset[str]
    members: dict[str, int] = field(default_factory=dict)
    read: frozenset[tuple[str, str]] = frozenset()
    params: frozenset[str] = frozenset()
    local_constants: dict[str, int] = field(default_factory=dict)


def without_comments(text: str, *, strings: bool = False) -> str:
    """The text with blanks for comments and, unless `strings`, for what strings hold. Lines keep their numbers."""

    def blank(match: re.Match[str]) -> str:
        kept = strings and match[0][0] in "\"'"
        return match[0] if kept else re.sub(r"[^\n]", " ", match[0])

    return _COMMENT_OR_STRING.sub(blank, text)


def includes(text: str) -> list[str]:
    """The headers that a text includes, as written."""
    return _INCLUDE.findall(text)


def parse(text: str) -> list[Item]:
    """The items of a text, in order. What directives mention (macros, unrolling) belongs to an item of its own."""
    code = without_comments(text)
    named = [match[0] for match in _DIRECTIVE.finditer(code) if not _INCLUDE.match(match[0])]
    directives = Item("other", {}, frozenset(word for line in named for word in _NAME.findall(line)))
    code = _DIRECTIVE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), code)
    return [directives, *(_item(tokens) for tokens in _split(_tokens(code)))]


def _tokens(code: str) -> list[Token]:
    line, found = 1, []
    for word in _TOKEN.findall(code):
        if word == "\n":
            line += 1
        else:
            found.append(Token(word, line))
    return found


def _split(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens of each top-level item; namespaces and `extern "C"` blocks are looked through."""
    item: list[Token] = []
    depth = 0
    for at, token in enumerate(tokens):
        if depth == 0 and token.text == "{" and _opens_a_space(item):
            item = []
            continue
        if depth == 0 and token.text == "}":
            continue
        item.append(token)
        depth += (token.text in _OPEN) - (token.text in _CLOSE)
        ahead = tokens[at + 1].text if at + 1 < len(tokens) else ""
        ends = token.text == ";" or (token.text == "}" and ahead not in (";", ",", "=", "("))
        if depth == 0 and ends:
            if len(item) > 1:
                yield item
            item = []


def _opens_a_space(item: Sequence[Token]) -> bool:
    words = [token.text for token in item]
    return words == ["extern"] or words[:1] == ["namespace"] or words[:2] == ["inline", "namespace"]


def _item(tokens: list[Token]) -> Item:
    own, tokens_behind = _template_parameters(tokens)
    kind, names = _defined(tokens_behind)
    is_params = kind == "type" and "Params" in names
    return Item(
        kind,
        names,
        frozenset(_used(tokens)) - own - names.keys(),
        members=_members(tokens) if is_params else {},
        read=frozenset(_read(tokens)),
        params=frozenset(_variables_of_params(tokens)),
        local_constants=_unused_local_constants(tokens) if kind in ("function", "kernel") else {},
    )


def _template_parameters(tokens: list[Token]) -> tuple[set[str], list[Token]]:
    """The names of `template <...>` in front of an item, and the tokens behind it."""
    if tokens[0].text != "template" or tokens[1].text != "<":
        return set(), tokens
    depth = 0
    for at, token in enumerate(tokens):
        depth += (token.text == "<") - (token.text == ">")
        if at > 0 and depth == 0:
            break
    inside = [token.text for token in tokens[1 : at + 1]]
    own = {word for word, ahead in pairwise(inside) if ahead in (",", ">", "=")}
    return {word for word in own if _NAME.fullmatch(word)}, tokens[at + 1 :]


def _defined(tokens: list[Token]) -> tuple[Kind, dict[str, int]]:
    first = tokens[0].text
    if first == "static_assert":
        return "assert", {}
    if first == "using":
        return ("other", {}) if tokens[1].text == "namespace" else ("type", {tokens[1].text: tokens[1].line})
    if first in ("struct", "class", "union"):
        name = _name_before(tokens[1:], "{:;<")
        return "type", {name.text: name.line} if name else {}
    if first == "enum":
        return "enum", _enumerators(tokens)
    return _function_or_constant(tokens)


def _function_or_constant(tokens: list[Token]) -> tuple[Kind, dict[str, int]]:
    name = _name_before(tokens, "(={[;")
    if name is None or name.text == "operator":
        return "other", {}
    if tokens[_index(tokens, name) + 1].text == "(":
        is_kernel = any(token.text == "__global__" for token in tokens)
        return ("kernel" if is_kernel else "function"), {name.text: name.line}
    return "constant", {name.text: name.line, **_more_declarators(tokens)}


def _index(tokens: list[Token], token: Token) -> int:
    return next(at for at, other in enumerate(tokens) if other is token)


def _name_before(tokens: list[Token], ends: str) -> Token | None:
    """The last name ahead of the first of these characters; attributes and specifiers with arguments are skipped."""
    depth, name = 0, None
    for at, token in enumerate(tokens):
        skipped = depth > 0 or tokens[at - 1].text in _WITH_ARGUMENTS or _is_attribute(tokens, at)
        if not skipped and token.text in ends:
            return name
        if token.text in _OPEN:
            depth += 1
        elif token.text in _CLOSE:
            depth -= 1
        elif depth == 0 and _NAME.fullmatch(token.text) and token.text not in _WITH_ARGUMENTS:
            name = token
    return None


def _is_attribute(tokens: list[Token], at: int) -> bool:
    return tokens[at].text == "[" and at + 1 < len(tokens) and tokens[at + 1].text == "["


def _more_declarators(tokens: list[Token]) -> dict[str, int]:
    """Of `constexpr int a = 1, b = 2;` the names behind the first."""
    found, depth = {}, 0
    for before, token, ahead in zip(tokens, tokens[1:], tokens[2:], strict=False):
        depth += (before.text in _OPEN) - (before.text in _CLOSE)
        if depth == 0 and before.text == "," and ahead.text == "=":
            found[token.text] = token.line
    return found


def _enumerators(tokens: list[Token]) -> dict[str, int]:
    words = [token.text for token in tokens]
    inside = tokens[words.index("{") :] if "{" in words else []
    pairs = pairwise(inside)
    return {token.text: token.line for before, token in pairs if before.text in "{," and _NAME.fullmatch(token.text)}


def _members(tokens: list[Token]) -> dict[str, int]:
    """The names ahead of `;`, `[` and default values, directly in a struct's braces."""
    found, depth = {}, 0
    for before, token in pairwise(tokens):
        depth += (before.text in _OPEN) - (before.text in _CLOSE)
        if depth == 1 and token.text in (";", "[", "=", "{") and _NAME.fullmatch(before.text):
            found[before.text] = before.line
    return found


def _used(tokens: list[Token]) -> Iterator[str]:
    """Names that are neither members nor the item's own variables; what is called is never taken for a variable."""
    end = Token("", 0)
    around = list(zip([end, *tokens], tokens, [*tokens[1:], end], strict=False))
    variables = {token.text for before, token, ahead in around if _declares(before.text, token.text, ahead.text)}
    for before, token, ahead in around:
        is_member = before.text in (".", "->") and not token.text[0].isupper()  # `-> Type` ends a lambda's head
        is_variable = token.text in variables and ahead.text not in ("(", "<")
        if _NAME.fullmatch(token.text) and not is_member and not is_variable:
            yield token.text


def _declares(before: str, name: str, ahead: str) -> bool:
    """Whether a lower-case name stands like that of a variable or a member: `int32_t* counts;`, `uint32_t row = 0`."""
    follows_a_type = before in ("*", "&", ">") or (_NAME.fullmatch(before) is not None and before not in _NO_TYPES)
    return bool(_VARIABLE.match(name)) and follows_a_type and ahead in (";", "=", ",", ")", "[", "{", ":")


def _read(tokens: list[Token]) -> Iterator[tuple[str, str]]:
    for variable, dot, member in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if dot.text in (".", "->") or (dot.text == "::" and variable.text == "Params"):
            yield variable.text, member.text


def _variables_of_params(tokens: list[Token]) -> Iterator[str]:
    words = [token.text for token in tokens]
    for at, word in enumerate(words):
        if word == "Params":
            rest = (other for other in words[at + 1 :] if other not in ("const", "&", "*", "__restrict__"))
            name = next(rest, "")
            if _NAME.fullmatch(name):
                yield name


def _unused_local_constants(tokens: list[Token]) -> dict[str, int]:
    words = [token.text for token in tokens]
    found = {}
    for at, word in enumerate(words):
        if word == "constexpr":
            name = _name_before(tokens[at + 1 :], "={[(;")
            if name is not None and words.count(name.text) == 1:
                found[name.text] = name.line
    return found
