"""HTML built from values: every string is escaped unless it is `Html` already, so that no name in a model file can become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Union

__all__ = ["Child", "Html", "element", "fragment", "table"]

VOID = {"br", "col", "hr", "img", "meta"}
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Html(str):
    """A string that is markup already."""

    __slots__ = ()


Child = Union[str, Html, None, Iterable["Child"]]  # noqa: UP007 - `|` cannot refer to itself


def fragment(*children: Child) -> Html:
    """The children one after another; strings are escaped, None is nothing."""
    out: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            out.append(child)
        elif isinstance(child, str):
            # Control characters are invalid in HTML even as references.
            out.append(html.escape(_CONTROL.sub("\ufffd", child), quote=False))
        else:
            out.append(fragment(*child))
    return Html("".join(out))


def element(tag: str, *children: Child, **attributes: str | int | None) -> Html:
    """`<tag attribute="...">children</tag>`. `class_` is written `class`; an attribute of None is left out."""
    names = ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items() if v is not None)
    open_tag = tag + "".join(f' {k}="{html.escape(_CONTROL.sub(chr(0xFFFD), str(v)))}"' for k, v in names)
    if tag in VOID:
        return Html(f"<{open_tag}>")
    return Html(f"<{open_tag}>{fragment(*children)}</{tag}>")


def table(head: Iterable[Child], rows: Iterable[Iterable[Child]], class_: str | None = None, words: Iterable[int] = ()) -> Html:
    """A table that scrolls sideways on a narrow screen.

    Args:
        words: indices of the columns that hold words; the others hold figures and are aligned right.
    """
    left = set(words)

    def cell(tag: str, i: int, content: Child, scope: str | None = None) -> Html:
        if isinstance(content, Html) and content.startswith(f"<{tag}"):
            return content
        return element(tag, content, class_="w" if i in left else None, scope=scope)

    body = [element("tr", [cell("td", i, c) for i, c in enumerate(row)]) for row in rows]
    header = element("tr", [cell("th", i, c, "col") for i, c in enumerate(head)])
    inner = element("table", element("thead", header), element("tbody", body), class_=class_)
    return element("div", inner, class_="scroll", tabindex="0")
