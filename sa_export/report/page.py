"""The shell of the page: style sheet, sections, figures. No script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64

from sa_export.report.markup import Child, Html, element, fragment
from sa_export.report.plots import Picture

__all__ = ["document", "figure_block", "fold", "note", "section"]

CSS = """
:root {
  color-scheme: light;
  --ink: #1c2430; --muted: #566172; --line: #dde2e8; --rule: #c3cad3; --soft: #f5f7f9;
  --good: #17703f; --bad: #ad2016; --open: #7a5b00;
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1128px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 40px 0 8px; padding-top: 18px; border-top: 1px solid var(--line); letter-spacing: -0.005em; }
h3 { font-size: 1rem; margin: 24px 0 6px; }
p { margin: 8px 0; max-width: 74ch; }
p.under { color: var(--muted); margin-top: 0; overflow-wrap: anywhere; }
p.note, li.note { color: var(--muted); font-size: 0.9rem; }
dfn { font-style: normal; font-weight: 600; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.87em; }
code { overflow-wrap: anywhere; }
pre {
  background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: 12px 14px;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.verdict { border-left: 6px solid var(--open); background: #fdf8e8; padding: 14px 18px; margin: 20px 0 18px; border-radius: 0 8px 8px 0; }
.verdict.pass { border-color: var(--good); background: #eef8f1; }
.verdict.fail { border-color: var(--bad); background: #fdf0ee; }
.verdict b { display: block; font-size: 1.35rem; letter-spacing: 0.02em; color: var(--open); }
.verdict.pass b { color: var(--good); }
.verdict.fail b { color: var(--bad); }
.verdict p { margin: 2px 0 0; font-size: 1.06rem; overflow-wrap: anywhere; }
.verdict ul { margin: 8px 0 0; padding-left: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 10px 0 4px; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px 9px; }
.tile span { display: block; color: var(--muted); font-size: 0.82rem; line-height: 1.35; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-size: 0.83rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 7px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; color: var(--muted); vertical-align: bottom; border-bottom: 2px solid var(--rule); }
th.w, td.w { text-align: left; }
tr.groups th { border: 0; padding-bottom: 0; }
th.g { text-align: center; }
th.g span { display: block; border-bottom: 1px solid var(--rule); }
td.name { font-weight: 600; }
td.long { white-space: normal; min-width: 16em; overflow-wrap: anywhere; }
th small { font-weight: 400; }
.chips code {
  display: inline-block; background: var(--soft); border: 1px solid var(--line); border-radius: 4px; padding: 0 6px; margin: 2px 4px 2px 0;
}
td details { margin: 0; }
td summary { font-weight: 400; padding: 0; }
th:first-child, td:first-child { padding-left: 2px; }
tr.first td { border-top: 1px solid var(--rule); }
tbody tr:last-child td { border-bottom: 2px solid var(--rule); }
td small { color: var(--muted); font-size: 0.92em; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
td.bad { background: #fdf0ee; }
.grey { color: var(--muted); }
.words { columns: 2; column-gap: 40px; margin-bottom: 8px; }
.words p { margin: 0 0 7px; break-inside: avoid; }
.row { display: flex; flex-wrap: wrap; gap: 4px 24px; align-items: flex-start; }
figure { margin: 14px 0 18px; break-inside: avoid; max-width: 100%; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: 0.9rem; color: var(--muted); margin-top: 4px; max-width: 80ch; }
details { margin: 8px 0; }
summary { cursor: pointer; font-weight: 600; padding: 5px 0; }
.view { overflow-x: auto; }
@media (max-width: 640px) {
  main { padding: 18px 14px 48px; }
  h1 { font-size: 1.4rem; }
  h2 { margin-top: 38px; }
  .verdict { padding: 12px 14px; }
  .view img { max-width: none; width: max(min(100%, var(--width)), calc(0.7 * var(--width))); }
  .words { columns: 1; }
  .main tr:not(.groups) > :nth-child(-n+2) { position: sticky; background: #fff; z-index: 1; }
  .main tr:not(.groups) > :first-child { left: 0; width: 3.6em; min-width: 3.6em; max-width: 3.6em; }
  .main tr:not(.groups) > :nth-child(2) { left: 3.6em; border-right: 1px solid var(--line); }
  .tiles { grid-template-columns: repeat(2, 1fr); gap: 8px; }
  .tile { padding: 8px 11px; }
  .tile b { font-size: 1.25rem; }
}
@media print {
  @page { size: A4; margin: 14mm; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  .scroll, .view { overflow: visible; }
  table { font-size: 7.2pt; }
  th, td { padding: 3px 5px; }
  p, li, tr, .tile, .verdict { break-inside: avoid; }
  h2, h3, summary, h2 + p { break-after: avoid; }
  .pair { flex-wrap: nowrap; gap: 10px; }
  .pair figure { min-width: 0; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""


def section(title: str, *children: Child, identifier: str | None = None) -> Html:
    return element("section", element("h2", title), *children, id=identifier)


def note(*children: Child) -> Html:
    return element("p", *children, class_="note")


def fold(title: Child, *children: Child, opened: bool = False) -> Html:
    return element("details", element("summary", title), *children, open="open" if opened else None)


def figure_block(picture: Picture, description: str, *caption: Child) -> Html:
    """A picture inside the page itself. On a phone it shrinks a little and then scrolls sideways, so that its labels stay legible.

    Args:
        description: what the picture shows, for readers who cannot see it.
    """
    source = "data:image/png;base64," + base64.b64encode(picture.png).decode("ascii")
    size = f"--width: {picture.width}px"
    image = element("img", src=source, width=picture.width, height=picture.height, style=size, alt=description)
    return element("figure", element("div", image, class_="view", tabindex="0"), element("figcaption", *caption) if caption else None)


def document(title: str, *children: Child) -> str:
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(CSS)),
    )
    return fragment(Html("<!doctype html>\n"), element("html", head, element("body", element("main", *children)), lang="en"), "\n")
