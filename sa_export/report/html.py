"""The report of a check as one HTML file and its pictures beside it."""

from __future__ import annotations

import os
from pathlib import Path

from sa_export.check.result import CheckResult, HeadMap, LengthResult
from sa_export.errors import UserError
from sa_export.report.markup import Child, Html, element
from sa_export.report.page import document, figure_block, fold, note, section
from sa_export.report.pictures import Pictures, draw_pictures
from sa_export.report.plots import Picture, error_rows
from sa_export.report.sections import exact_section, limits_section, main_section, repeat_section, settings_section, verdict_block
from sa_export.report.wording import fixed, percent

__all__ = ["REPORT", "report_files", "write_files", "write_report"]

REPORT = "report.html"


def _opened(result: CheckResult, i: int) -> bool:
    """Whether the figures of a candidate are unfolded at first: those of the candidates that decide, or else of the first."""
    return result.candidates[i].gated or (i == 0 and not any(c.gated for c in result.candidates))


def _maps_section(result: CheckResult, pictures: Pictures) -> Html:
    title = "Where attention is kept: layers and heads"
    if not pictures.maps:
        return section(title, element("p", "No per-head figures were measured in this run."))
    parts: list[Child] = []
    for i, candidate in enumerate(result.candidates):
        rows: list[tuple[int, LengthResult]] = [(j, r) for j, r in enumerate(candidate.lengths) if (i, j) in pictures.maps]
        longest = max((r.length for _, r in rows), default=0)
        for j, row in sorted(rows, key=lambda pair: -pair[1].length):
            density, cra = pictures.maps[i, j]
            size = f"{len(row.sites)} sites by {max(len(s.density) for s in row.sites)} heads"
            beside = pictures.files[density].width + pictures.files[cra].width <= 1056  # what the page is wide
            pair = element(
                "div",
                figure_block(
                    pictures.files[density], f"Density of {candidate.name} at {row.length} tokens, {size}; mean {fixed(row.density)}"
                ),
                figure_block(pictures.files[cra], f"CRA of {candidate.name} at {row.length} tokens, {size}; mean {fixed(row.cra_mean)}"),
                class_="row pair" if beside else "row",
            )
            figures = f"density {fixed(row.density)}, CRA {fixed(row.cra_mean)}, worst row {fixed(row.cra_min)}"
            label = f"{candidate.name}, {row.length} tokens: {figures}"
            parts.append(fold(label, pair, opened=row.length == longest and _opened(result, i)))
    explain = element(
        "p",
        "Each row is a layer and each column a query head. ",
        element("dfn", "Density"),
        " is the share of the causal pairs that the head computes: the paler the cell, the less work. ",
        element("dfn", "CRA"),
        " is the share of the true attention that is kept, by the mean query and by the worst one: the darker the cell, the more is lost.",
    )
    scale = "Colours are on the same root scale from 0 to 1 in every map, so maps may be compared."
    return section(title, explain, parts, note(scale))


def _blocks_section(result: CheckResult, pictures: Pictures) -> Html:
    title = "What single heads read"
    if not pictures.blocks:
        why = (
            "check.npz, which holds the arrays, was not given" if any(c.maps for c in result.candidates) else "no heads were chosen for it"
        )
        return section(title, element("p", f"There are no pictures of kept blocks: {why}."))
    explain = (
        "Left: where the queries (downwards) really look among the keys before them (to the right). Right: the blocks that the operator "
        "reads, in blue. Orange is attention that was not read: the stronger the colour, the more was lost."
    )
    parts: list[Child] = []
    for i, candidate in enumerate(result.candidates):
        heads = {j: head for j, head in enumerate(candidate.maps) if (i, j) in pictures.blocks}
        lengths = sorted({head.length for head in heads.values()}, reverse=True)
        for length in lengths:
            shown = [_head(head, pictures.files[pictures.blocks[i, j]]) for j, head in heads.items() if head.length == length]
            parts.append(fold(f"{candidate.name}, {length} tokens", shown, opened=length == lengths[0] and _opened(result, i)))
    return section(title, element("p", explain), parts)


def _head(head: HeadMap, picture: Picture) -> Html:
    caption = (
        f"{head.site}, head {head.head}: density {fixed(head.density)}; the worst row keeps {percent(head.cra_min, 1)} of its attention. "
        f"Blocks of {head.block_q} queries by {head.block_k} keys."
    )
    return figure_block(picture, f"True attention beside kept blocks. {caption}", caption)


def _error_section(result: CheckResult, pictures: Pictures) -> Html:
    title = "Error layer by layer"
    if pictures.errors is None:
        return section(title, element("p", "No per-site errors were measured in this run."))
    rows = error_rows(result)
    lengths = {row.length for _, _, row in rows}
    what = f"at {lengths.pop()} tokens" if len(lengths) == 1 else "at the lengths named"
    explain = (
        "Left: what one site gets wrong by itself, given its own queries, keys and values. Right: how far its output has moved from the "
        "original model, with the errors of all earlier layers in it."
    )
    picture = pictures.files[pictures.errors]
    caption = f"Relative L2 norms {what}, on a logarithmic scale."
    return section(title, element("p", explain), figure_block(picture, f"Relative error of each attention site {what}", caption))


def _tradeoff_section(pictures: Pictures) -> Html | None:
    if pictures.tradeoff is None:
        return None
    explain = "What each candidate pays for what it skips. Further left is less work; good is a loss near 0 and needles near 100 %."
    caption = "Straight dashed lines are limits. A thin line joins the prompt lengths of one candidate."
    picture = figure_block(pictures.files[pictures.tradeoff], "Density against change of loss and needle recall", caption)
    return section("Candidates against each other", element("p", explain), picture)


def report_files(result: CheckResult, arrays_npz: Path | None) -> dict[str, bytes]:
    """The report in memory: file name -> content, `report.html` last.

    Raises:
        UserError: `arrays_npz` cannot be read, or is not of the same run as `result`.
    """
    pictures = draw_pictures(result, arrays_npz)
    names = [c.name for c in result.candidates]
    page = document(
        f"SampleAttention check: {', '.join(names)}",
        element("h1", "SampleAttention against full attention"),
        element("p", "Full model ", element("code", result.full), class_="under"),
        verdict_block(result),
        main_section(result),
        exact_section(result),
        _maps_section(result, pictures),
        _blocks_section(result, pictures),
        _error_section(result, pictures),
        _tradeoff_section(pictures),
        settings_section(result),
        limits_section(),
        repeat_section(result),
    )
    files = {name: picture.png for name, picture in pictures.files.items()}
    # A file name from another system may hold bytes that are no text; they are shown as escapes.
    files[REPORT] = page.encode("utf-8", errors="backslashreplace")
    return files


def write_files(files: dict[str, bytes], folder: Path) -> None:
    """Writes all files or none: each goes to a temporary name first, and gets its own when all are on the disk.

    Raises:
        UserError: the folder cannot be made or written, or the disk is full.
    """
    made = not folder.exists()
    temporary = {folder / f".{name}.{os.getpid()}.tmp": folder / name for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(temporary, files.values(), strict=True):
            path.write_bytes(content)
        for path, final in temporary.items():
            path.replace(final)
    except OSError as error:
        for path in temporary:
            path.unlink(missing_ok=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise UserError(f"The report could not be written to {folder} ({error.strerror}); make room or choose another folder.") from None


def write_report(result: CheckResult, arrays_npz: Path | None, folder: Path) -> Path:
    """Writes `report.html` (self-contained: pictures inside, no script, nothing loaded) and the same pictures as PNG files.

    Files: `density_<candidate>_<length>.png`, `cra_<candidate>_<length>.png`, `blocks_<candidate>_<length>_<site>_head<n>.png`,
    `errors.png`, and `tradeoff.png` when there is more than one candidate. Files of these names are replaced: `folder` is the caller's own
    output folder.

    Args:
        arrays_npz: `check.npz`; None leaves the pictures of kept blocks out, and the page says so.

    Returns:
        The path of `report.html`.

    Raises:
        UserError: `arrays_npz` cannot be read or is of another run; the folder cannot be written. Nothing half-written stays.
    """
    write_files(report_files(result, arrays_npz), folder)
    return folder / REPORT
