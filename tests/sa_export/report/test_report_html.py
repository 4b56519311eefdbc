"""The page: what stands on it, that it is safe and self-contained, and that it is written whole or not at all."""

from __future__ import annotations

import base64
import errno
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sa_export.check.result import CheckResult, ExactCase, Gate
from sa_export.errors import UserError
from sa_export.report import write_report
from tests.sa_export.report import report_samples as samples

VOID = {"br", "col", "hr", "img", "meta"}


class Page(HTMLParser):
    """Elements, attributes, visible text and tables of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.heads: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "h2":
            self.heads.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "title" in self.open:
            return
        self.words.append(data)
        if "h2" in self.open:
            self.heads[-1] += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return "".join(self.words)

    def classes(self, tag: str) -> list[str]:
        return [a.get("class") or "" for t, a in self.tags if t == tag]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def small(name: str = "residue", **more: object) -> CheckResult:
    """One candidate at one length with no head pictures: quick to draw."""
    c = samples.candidate(name, (4096,), {}, maps=0)
    return samples.result([replace(c, **more)])  # type: ignore[arg-type]


def with_row(**changes: object) -> CheckResult:
    c = small().candidates[0]
    return samples.result([replace(c, lengths=[replace(c.lengths[0], **changes)])])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[CheckResult, Path, Page]:
    arrays: dict[str, np.ndarray] = {}
    result = samples.demo(arrays)
    folder = tmp_path_factory.mktemp("demo")
    report = write_report(result, samples.save_arrays(arrays, folder), folder)
    assert report == folder / "report.html"
    return result, folder, read(report)


def test_sections_in_order(demo: tuple[CheckResult, Path, Page]) -> None:
    _, folder, page = demo
    assert page.heads == [
        "Results",
        "Is the rewriting exact?",
        "Where attention is kept: layers and heads",
        "What single heads read",
        "Error layer by layer",
        "Candidates against each other",
        "Settings",
        "What this report does not show",
        "To repeat it",
    ]
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert 0 < text.index('class="verdict') < text.index("<table") < text.index("<img")
    assert "say nothing about the speed of a GPU kernel" in page.text


def test_main_table_has_every_row_and_figure(demo: tuple[CheckResult, Path, Page]) -> None:
    result, _, page = demo
    rows = page.tables[0][2:]
    expected = sorted(((r.length, c, r) for c in result.candidates for r in c.lengths), key=lambda x: x[0])
    assert len(rows) == len(expected) == 6
    for cells, (length, c, r) in zip(rows, expected, strict=True):
        assert cells[:2] == [str(length), c.name]
        assert cells[2] == ("✓ pass" if all(g.ok for g in r.gates) else "✗ fail")
        assert cells[3:6] == [f"{x:.3f}" for x in (r.density, r.cra_mean, r.cra_min)]
        assert cells[6:9] == [f"{r.loss_full:.4f}", f"{r.loss:.4f}", f"{100 * r.loss_change:+.2f} %"]
        assert cells[9:11] == [f"{r.recalled_full}/{r.needles}", f"{r.recalled}/{r.needles}"]
        assert cells[11:14] == [f"{100 * r.top1:.1f} %", f"{r.kl_mean:.1e}", f"{r.greedy_same}/{r.greedy_tokens}"]
        assert [float(x) for x in cells[14:16]] == pytest.approx([r.seconds_full, r.seconds], rel=0.05)


def test_pictures_are_inside_the_page_and_beside_it(demo: tuple[CheckResult, Path, Page]) -> None:
    _, folder, page = demo
    images = [a for t, a in page.tags if t == "img"]
    inside = sorted(base64.b64decode((a["src"] or "").removeprefix("data:image/png;base64,")) for a in images)
    files = {p.name: p.read_bytes() for p in folder.glob("*.png")}
    assert inside == sorted(files.values())
    assert all(a["alt"] and int(a["width"] or 0) > 100 and int(a["height"] or 0) > 100 for a in images)
    names = [
        f"{kind}_{c}_{n}.png" for kind in ("density", "cra") for c in ("residue", "column_slash", "stripe_window") for n in (2048, 4096)
    ]
    blocks = [n for n in files if n.startswith("blocks_")]
    assert set(files) == {*names, *blocks, "errors.png", "tradeoff.png"}
    assert sorted(blocks)[1] == "blocks_residue_4096_layers.1_head0.png"
    assert len(blocks) == 4
    for content in files.values():
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(content) > 5000


def test_nothing_is_loaded_and_nothing_runs(demo: tuple[CheckResult, Path, Page]) -> None:
    _, folder, page = demo
    assert not {t for t, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "form"}
    for _, attributes in page.tags:
        assert not [k for k in attributes if k.startswith("on") or k == "href"]
        assert (attributes.get("src") or "data:").startswith("data:image/png;base64,") or "src" not in attributes
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text


def test_terms_are_explained_and_the_run_can_be_repeated(demo: tuple[CheckResult, Path, Page]) -> None:
    result, _, page = demo
    for term in ("Density is the share", "CRA (cumulative residual attention) is the share", "Needles are facts", "Greedy is"):
        assert term in page.text
    assert result.command in page.text
    assert result.machine in page.text
    for name, version in result.versions.items():
        assert [name, version] in page.tables[-1]


def test_every_string_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;\x00\x1b"
    shown = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;\ufffd\ufffd"
    arrays: dict[str, np.ndarray] = {}
    c = samples.candidate("residue", (1000,), arrays, layers=2, heads=2, maps=1)
    row = c.lengths[0]
    row = replace(row, sites=[replace(s, id=f"{s.id}{bad}") for s in row.sites], gates=[Gate(bad, 2.0, "<=", 1.0)])
    head = replace(c.maps[0], site=bad, candidate=bad)
    c = replace(
        c,
        name=bad,
        model=bad,
        settings={f"a{bad}": {bad: bad}, "b": {bad: 1}},
        exact=[ExactCase(bad, 1.0, 1.0, 1e-4)],
        lengths=[row],
        maps=[head],
    )
    declined = [{"id": bad, "node": bad, "reason": bad}]
    result = samples.result([c], full=bad, declined=declined, versions={bad: bad}, machine=bad, command=bad)
    page = read(write_report(result, samples.save_arrays(arrays, tmp_path), tmp_path / "out"))
    assert "script" not in {t for t, _ in page.tags}
    assert len([t for t, _ in page.tags if t == "img"]) == 4
    assert not any(k.startswith("on") for _, a in page.tags for k in a)
    # model, command, machine, versions (two), the declined site (three), the settings: each is there to be read.
    assert page.text.count(shown) >= 12
    assert "\x00" not in page.text
    for path in (tmp_path / "out").iterdir():
        assert path.name.replace(".", "").replace("-", "").replace("_", "").isalnum()


def test_a_failed_gate_is_the_first_thing_said(tmp_path: Path) -> None:
    gates = [Gate("needle recall / full", 200 / 206, ">=", 0.99), Gate("loss rise", 0.012, "<=", 0.005), Gate("density", 0.2, "<=", 0.35)]
    result = with_row(loss_full=2.0, loss=2.024, recalled=200, density=0.2, gates=gates)
    result.candidates[0].lengths[0] = replace(
        result.candidates[0].lengths[0], gates=[gates[0], replace(gates[1], value=result.candidates[0].lengths[0].loss_change), gates[2]]
    )
    page = read(write_report(result, None, tmp_path))
    assert "verdict fail" in page.classes("div")
    start = page.text.index("FAIL")
    assert page.text[start:].startswith(
        "FAILresidue at 4096 tokens: needle recall / full 97.1 % is below the limit 99.0 % by 1.9 percentage points; 1 more failed."
        "residue at 4096 tokens: loss rise +1.20 % is above the limit +0.50 % by 0.7 percentage points"
    )
    cells = page.tables[0][2]
    bad = [i for i, (t, a) in enumerate(x for x in page.tags if x[0] == "td") if a.get("class") == "bad"][:2]
    assert [cells[i] for i in bad] == ["+1.20 %", "200/208"]
    assert page.tables[1][1] == ["4096", "residue", "97.1 % ✗", "+1.20 % ✗", "0.2 ✓"]


def test_a_failed_exact_case_is_said_with_its_size(tmp_path: Path) -> None:
    exact = [samples.EXACT[0], ExactCase("decode", 0.5, 0.03, 1e-4), ExactCase("left padding", math.nan, math.nan, 1e-4)]
    page = read(write_report(small(exact=exact), None, tmp_path))
    assert (
        "residue at alpha = 1, decode: the relative difference 0.03 is above the tolerance 0.0001, 300 times as much; 1 more failed."
        in page.text
    )
    assert "residue at alpha = 1, left padding: the difference from the original could not be measured" in page.text
    table = page.tables[2]
    assert table[1:] == [
        ["prefill", "1e-04", "1.9e-06 ✓", "3.1e-05"],
        ["decode", "1e-04", "3.0e-02 ✗", "5.0e-01"],
        ["left padding", "1e-04", "n/a ✗", "n/a"],
    ]


def test_candidates_for_comparison_do_not_decide(tmp_path: Path) -> None:
    good, bad = (samples.candidate(n, (4096,), {}, maps=0) for n in ("residue", "column_slash"))
    page = read(write_report(samples.result([good, replace(bad, gated=False)]), None, tmp_path / "a"))
    assert "verdict pass" in page.classes("div")
    assert (
        "residue is within all 5 limits at 4096 tokens and the same function as full attention at alpha = 1 in 5 of 5 cases." in page.text
    )
    assert page.tables[0][3][2] == "✗ fail"
    assert "bad" not in page.classes("td")
    assert "column_slash: for comparison only" in page.text
    page = read(write_report(samples.result([replace(bad, gated=False)]), None, tmp_path / "b"))
    assert "verdict open" in page.classes("div")
    assert "Nothing was decided: every candidate is shown for comparison only." in page.text


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    nan = math.nan
    result = with_row(
        density=nan, cra_mean=nan, cra_min=nan, loss=nan, needles=0, recalled=0, recalled_full=0, kl_mean=nan, kl_max=nan, top1=nan,
        greedy_tokens=0, greedy_same=0, seconds=nan, gates=[Gate("loss rise", nan, "<=", 0.005)],
    )  # fmt: skip
    sites = result.candidates[0].lengths[0].sites
    sites[0] = replace(sites[0], density=[nan] * 4, cra_min=[], output_error=nan, drift=nan)
    page = read(write_report(result, None, tmp_path))
    assert "residue at 4096 tokens: loss rise could not be measured (allowed: at most +0.50 %)." in page.text
    assert page.tables[0][2][3:] == ["n/a", "n/a", "n/a", "2.1557", "n/a", "n/a", "n/a", "n/a", "n/a", "n/a", "n/a", "8.6", "n/a"]
    assert "nan" not in page.text.lower().replace("nanc", "")


def test_without_arrays_sites_or_lengths(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    result = samples.result([samples.candidate("residue", (2048,), arrays, maps=1)])
    page = read(write_report(result, None, tmp_path / "a"))
    assert "check.npz, which holds the arrays, was not given" in page.text
    assert not list((tmp_path / "a").glob("blocks*"))
    page = read(write_report(with_row(sites=[]), None, tmp_path / "b"))
    assert "No per-head figures were measured in this run." in page.text
    assert "No per-site errors were measured in this run." in page.text
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["report.html"]
    page = read(write_report(small(lengths=[], exact=[], settings={}), None, tmp_path / "c"))
    assert "Nothing was decided: no threshold was set." in page.text
    assert "No site was rewritten." in page.text


def test_settings_of_sites_that_differ(tmp_path: Path) -> None:
    settings = {
        "layers.0": {"policy": "dense"},
        "layers.1": {**samples.SETTINGS, "alpha": [0.95] * 4},
        "layers.2": {**samples.SETTINGS, "alpha": [0.95] * 4},
        "layers.3": {**samples.SETTINGS, "alpha": [0.95] * 4},
        "layers.4": {**samples.SETTINGS, "alpha": [0.9, 0.95, 0.9, 0.8]},
        "layers.5": {**samples.SETTINGS, "alpha": [0.5 + i / 100 for i in range(32)]},
    }
    declined = [{"id": "layers.6", "node": "/layers.6/Add", "reason": "a sliding window of 4096 tokens"}]
    result = samples.result(small(settings=settings).candidates, declined=declined)
    page = read(write_report(result, None, tmp_path))
    table = next(t for t in page.tables if t[0][0] == "sites")
    assert table[0] == ["sites", "policy", "alpha"]
    assert table[1:4] == [
        ["layers.0", "dense", "–"],
        ["layers.1 to layers.3", "residue", "0.95 (4 heads alike)"],
        ["layers.4", "residue", "0.9, 0.95, 0.9, 0.8"],
    ]
    assert table[4][2].startswith("32 values, 0.5 to 0.81" + "0.5, 0.51, 0.52")
    assert "The same at every site that uses it:stride: 16 block_q: 128" in page.text
    assert ["layers.6", "/layers.6/Add", "a sliding window of 4096 tokens"] in next(t for t in page.tables if t[0][0] == "site")


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (1, 40), (80, 64)])
def test_any_number_of_layers_and_heads(tmp_path: Path, layers: int, heads: int) -> None:
    c = samples.candidate("tile", (2048,), {}, layers=layers, heads=heads, maps=0, dense=(0,) if layers > 1 else ())
    page = read(write_report(samples.result([c]), None, tmp_path))
    maps = [a for t, a in page.tags if t == "img" and (a["alt"] or "").startswith(("Density", "CRA"))]
    assert [f"{layers} sites by {heads} heads" in (a["alt"] or "") for a in maps] == [True, True]
    assert all(int(a["width"] or 0) <= 1080 for a in maps)
    assert not (tmp_path / "tradeoff.png").exists()


def test_names_that_collide_get_files_of_their_own(tmp_path: Path) -> None:
    names = ["a/b", "a b", "A-b", "../../etc"]
    candidates = [replace(samples.candidate("tile", (512,), {}, layers=1, heads=1, maps=0), name=n) for n in names]
    write_report(samples.result(candidates), None, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("density*")) == [
        "density_..-..-etc_512.png", "density_A-b_512-3.png", "density_a-b_512-2.png", "density_a-b_512.png",
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_arrays_of_another_run_are_refused(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    result = samples.result([samples.candidate("residue", (2048,), arrays, maps=1)])
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"residue/0/mass of shape \[3, 3\], but check\.json says \[16, 32\]"):
        write_report(result, samples.save_arrays({**arrays, "residue/0/mass": np.zeros((3, 3))}, tmp_path), out)
    with pytest.raises(UserError, match="holds no array residue/0/mass"):
        write_report(result, samples.save_arrays({"residue/0/blocks": arrays["residue/0/blocks"]}, tmp_path), out)
    (tmp_path / "check.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match=r"is not a readable \.npz file"):
        write_report(result, tmp_path / "check.npz", out)
    with pytest.raises(UserError, match=r"check\.npz does not exist"):
        write_report(result, tmp_path / "none" / "check.npz", out)
    assert not out.exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = small()
    write = Path.write_bytes
    written: list[Path] = []

    def full(self: Path, data: bytes) -> int:
        written.append(self)
        if len(written) == 3:
            write(self, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"could not be written to .*No space left on device"):
        write_report(result, None, tmp_path / "new")
    assert len(written) == 3
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "old"
    kept.mkdir()
    write(kept / "report.html", b"earlier")
    written.clear()
    with pytest.raises(UserError, match="No space left on device"):
        write_report(result, None, kept)
    assert [(p.name, p.read_bytes()) for p in kept.iterdir()] == [("report.html", b"earlier")]
