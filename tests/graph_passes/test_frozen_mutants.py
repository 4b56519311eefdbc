"""Frozen graphs of real exporters with one or two seeded faults, and mutated attention.yaml files.

Never a traceback, and whatever is still rewritten is still equal to the mutant itself in ONNX Runtime. `SA_MUTANTS` is the number of
mutants (1000 for the whole), `SA_MUTANTS_SEED` where they start, `SA_FROZEN` another folder of graphs.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graph_passes.config import load_config, write_config
from graph_passes.errors import GraphError
from graph_passes.op import DOMAIN, OP_TYPE, Policy
from graph_passes.pipeline import inspect, rewrite
from graph_passes.report import RewriteReport
from graph_passes.site import Operand
from tests.data.frozen import GRAPHS, Frozen, frozen, thaw
from tests.data.judge import EXACT, Runner, feeds
from tests.graph_passes import builder, running
from tests.graph_passes.builder import Spelling
from tests.graph_passes.test_mutations import mutate

MUTANTS = int(os.environ.get("SA_MUTANTS", "0"))
SEED = int(os.environ.get("SA_MUTANTS_SEED", "0"))
LARGEST = 400_000
"""Bytes of a frozen graph that is still mutated by default: the subset is to be quick."""
CALLS = ((2, 20, 3, "left"), (2, 5, 17, "right"), (1, 18, 0, "none"), (2, 18, 0, "left"))


def graphs() -> list[Frozen]:
    folder = Path(os.environ.get("SA_FROZEN", GRAPHS))
    return [g for g in frozen(folder) if "int4" not in g.route and "paged" not in g.route]


def rename(model: onnx.ModelProto, generator: random.Random) -> str:
    """Other names for all nodes and inner tensors: nothing may depend on a name."""
    graph = model.graph
    kept = {v.name for v in (*graph.input, *graph.output)} | {""}
    inner = [o for n in graph.node for o in n.output if o not in kept]
    new = {name: f"t{i}" for i, name in enumerate(generator.sample(inner, len(inner)))}
    if any(a.HasField("g") for n in graph.node for a in n.attribute):
        return "nothing"
    for i, node in enumerate(graph.node):
        node.name = f"n{i}"
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    del graph.value_info[:]
    return "rename"


class Bare(Runner):
    """Without ONNX Runtime's optimizer, which breaks some mutants on its own. own_memory: every tensor is allocated by itself."""

    def __init__(self, path: Path, *, own_memory: bool = False) -> None:
        import onnxruntime

        before = onnxruntime.SessionOptions

        def plain() -> object:
            options = before()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.enable_cpu_mem_arena = options.enable_mem_pattern = not own_memory
            return options

        onnxruntime.SessionOptions = plain
        try:
            super().__init__(path)
        finally:
            onnxruntime.SessionOptions = before


def compare(path: Path, out: Path, report: RewriteReport, what: str) -> str:
    """Runs both with the output of every site exposed, where the mutant still runs."""
    mutant, new = onnx.load(path), onnx.load(out)
    sites = [s for s in report.inspection.sites if s.id in report.policies]
    masks = [n.input[3] if len(n.input) > 3 else "" for n in new.graph.node if n.op_type == OP_TYPE and n.domain == DOMAIN]
    shown = [name for s in sites for name in (s.output, s.query.tensor, s.key.tensor, s.value.tensor)]
    for model, names in ((mutant, shown), (new, shown + [m for m in masks if m])):
        there = {o.name for o in model.graph.output} | {i.name for i in model.graph.input}
        made = {o for n in model.graph.node for o in n.output}
        for name in dict.fromkeys(names):
            if name not in there and name in made:
                known = helper.make_tensor_value_info(name, TensorProto.BOOL, None) if name in masks else onnx.ValueInfoProto(name=name)
                model.graph.output.append(known)
    onnx.save(new, out)
    onnx.save(mutant, path)
    try:
        original = Bare(path)
    except Exception:
        return "does not load"
    broken, rewritten = "", None
    try:
        rewritten = Bare(out)
    except Exception as error:  # what a broken graph says when it is loaded depends on how much of its shapes is known
        broken = f"does not load: {error}"
    fate = "does not run"
    for batch, rows, past, pad in CALLS:
        try:
            data = feeds(original, batch, rows, past, pad)
            if isinstance(data, str):
                continue
            expected = original(data)
        except Exception:  # a fault in the declared lengths, or in the graph
            continue
        assert rewritten is not None, f"{what}: the original runs {batch, rows, past, pad}, the rewritten model {broken}"
        try:
            got = rewritten(data)
        except Exception as error:
            raise AssertionError(f"{what}: the original runs {batch, rows, past, pad}, the rewritten model does not: {error}") from error
        known = {**data, **got}  # a mask may be an input
        first: np.ndarray | None = None
        clean = True
        for site, mask in zip(sites, masks, strict=True):
            if site.output not in expected:  # made by an operator that was taken apart
                break
            a, b = expected[site.output].astype(np.float64), got[site.output].astype(np.float64)
            keys = known[mask].astype(bool) if mask else np.ones((batch, past + rows), dtype=bool)
            first = keys if first is None else first
            # What an earlier layer gives at rows that its mask calls padding means nothing, and shows where another mask calls them real.
            if keys.shape != first.shape or (keys != first).any() or a.ndim != 4 or a.shape[2] > keys.shape[1] or site.lead:
                break
            keys = np.broadcast_to(keys, (a.shape[0], keys.shape[1]))
            real = keys[:, keys.shape[1] - a.shape[2] :]
            if not all(fed_alike(o, {**data, **expected}, known, keys, original.half) for o in (site.query, site.key, site.value)):
                break
            x, y = a.swapaxes(1, 2)[real], b.swapaxes(1, 2)[real]
            # A guard against rows without keys, Where(IsNaN(p), 0, p), also hides queries and keys that are no numbers.
            clean = bool(np.isfinite(x).all()) and not ((x == 0).all(-1) & np.isnan(y).any(-1)).any()
            if not clean:
                break
            if not close(x, y, original.half):
                assert not is_defined(path, data, site.output, expected), f"{what}: {site.id} differs in {batch, rows, past, pad}"
                clean = False
                break
            fate = "equal" if x.size else fate
        if clean and all(known[mask].all() for mask in masks if mask):  # no padding: every number means something
            for name in sorted(set(expected) & set(got)):
                if expected[name].dtype.kind == "f" and np.isfinite(expected[name]).all():
                    if close(expected[name], got[name], original.half):
                        fate = "equal"
                    else:
                        assert not is_defined(path, data, name, expected), f"{what}: {name} differs in {batch, rows, past, pad}"
    return fate


def is_defined(path: Path, data: dict[str, np.ndarray], name: str, expected: dict[str, np.ndarray]) -> bool:
    """Whether the original gives an output again when its tensors lie elsewhere. ONNX Runtime leaves parts of an invalid join (an empty
    tensor and one of another width) as it finds them in memory."""
    return np.array_equal(Bare(path, own_memory=True)(data)[name], expected[name], equal_nan=True)


def fed_alike(operand: Operand, want: dict[str, np.ndarray], got: dict[str, np.ndarray], keys: np.ndarray, half: bool) -> bool:
    """The real rows of a query, key or value are the same in both: a mutant may have mixed what lies under padding into them."""
    if operand.tensor not in want or operand.tensor not in got:
        return False
    pair = []
    for values in (want, got):
        value = values[operand.tensor].astype(np.float64)
        value = value if operand.perm is None else value.transpose(operand.perm)
        if len(value) != len(keys) or value.shape[2] > keys.shape[1]:
            return False
        pair.append(value.swapaxes(1, 2)[keys[:, keys.shape[1] - value.shape[2] :]])
    return close(*pair, half)


def close(want: np.ndarray, got: np.ndarray, half: bool) -> bool:
    limit = (2e-2 if half else 1e-4) * max(1.0, float(np.abs(want).max(initial=0.0)))
    return want.shape == got.shape and float(np.abs(want.astype(np.float64) - got).max(initial=0.0)) <= limit


def fate_of(path: Path, out: Path, what: str) -> str:
    """What becomes of a mutant; AssertionError for a traceback, a report without reasons, and a rewrite that differs."""
    try:
        report = inspect(path)
        assert all(d.reason for d in report.declined), what
        if not report.sites:
            return "declined"
        done = rewrite(path, out, EXACT, force=True)
    except GraphError as error:
        if "\n" in str(error):
            raise AssertionError(f"{what}: more than one line: {error}") from error
        return "refused"
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return compare(path, out, done, what)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_frozen_mutants(tmp_path: Path) -> None:
    chosen = graphs()
    if not chosen:
        pytest.skip("no frozen graphs here; python -m tests.data.make makes them")
    wanted = MUTANTS or 24
    generator = random.Random(SEED)
    models: dict[str, bytes] = {}
    fates: Counter[str] = Counter()
    wrong: list[str] = []
    path, out = tmp_path / "mutant.onnx", tmp_path / "out.onnx"
    while fates.total() < wanted:
        graph = generator.choice(chosen)
        content = models.setdefault(graph.id, thaw(graph.path))
        if not MUTANTS and len(content) > LARGEST:
            fates["too large"] += 1
            assert fates["too large"] < 10 * wanted
            wanted += 1
            continue
        model = onnx.load_model_from_string(content)
        faults = [mutate(model, generator) for _ in range(generator.randint(1, 2))]
        if generator.random() < 0.3:
            faults.append(rename(model, generator))
        what = f"{graph.id}: {'; '.join(faults)}"
        path.write_bytes(model.SerializeToString())
        try:
            fates[fate_of(path, out, what)] += 1
        except AssertionError as error:
            fates["wrong"] += 1
            wrong.append(str(error))
    print(dict(fates))
    assert not wrong, "\n".join(wrong)
    assert fates["equal"] + fates["does not run"] + fates["does not load"] > 0, fates
    if MUTANTS:
        assert fates["equal"] > MUTANTS // 10, fates


VALUES = (
    "0",
    "1",
    "-1",
    "0.5",
    "1e9",
    "nan",
    ".inf",
    "true",
    "~",
    "[]",
    "[0.5, 1]",
    "{}",
    "''",
    "dense",
    "tile",
    "2",
    "64",
    "0x10",
    "1_000",
)


def mutate_text(text: str, generator: random.Random) -> str:
    """One fault in an attention.yaml: a value, a key, an indentation, a line, or a character."""
    lines = text.split("\n")
    kind = generator.choice(["value", "value", "key", "indent", "drop", "twice", "swap", "character", "cut"])
    i = generator.randrange(len(lines))
    if kind == "value" and ":" in lines[i]:
        lines[i] = lines[i].split(":", 1)[0] + ": " + generator.choice(VALUES)
    elif kind == "key" and ":" in lines[i]:
        key, rest = lines[i].split(":", 1)
        lines[i] = key + generator.choice(["x", "_", " ", ":", ""]) + ":" + rest
    elif kind == "indent":
        lines[i] = " " * generator.randrange(5) + lines[i].lstrip()
    elif kind == "drop":
        del lines[i]
    elif kind == "twice":
        lines.insert(i, lines[i])
    elif kind == "swap":
        j = generator.randrange(len(lines))
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == "character" and lines[i]:
        k = generator.randrange(len(lines[i]))
        lines[i] = lines[i][:k] + generator.choice("\t:{}[]&*!|>%@`'\"#-,\x00é0 ") + lines[i][k + 1 :]
    elif kind == "cut":
        return text[: generator.randrange(len(text))]
    return "\n".join(lines)


def test_mutated_configurations(tmp_path: Path) -> None:
    """What still loads rewrites to a valid model, and at alpha 1 to an equal one."""
    model = builder.attention(Spelling())
    path, out, yaml = tmp_path / "model.onnx", tmp_path / "out.onnx", tmp_path / "attention.yaml"
    onnx.save(model, path)
    report = inspect(path)
    text = write_config(yaml, report.sites, Policy(min_length=0), overrides={"layers.0": {"alpha": 0.9}}).read_text()
    data = builder.feeds(model, 2, 20, 3, pad="left")
    expected = running.Session(path)(data)
    real = running.real_rows(data["attention_mask"], 20) if "attention_mask" in data else np.ones((2, 20), dtype=bool)
    generator = random.Random(SEED)
    ran: dict[str, None] = {}
    fates: Counter[str] = Counter()
    sentences: list[str] = []
    for _ in range(MUTANTS or 1000):
        changed = text
        for _ in range(generator.randint(1, 3)):
            changed = mutate_text(changed, generator)
        yaml.write_text(changed, encoding="utf-8")
        try:
            config = load_config(yaml)
            policies = config.policies(report.sites, report.declined)
        except GraphError as error:
            fates["refused"] += 1
            sentences.append(str(error))
            continue
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} for\n{changed}") from error
        fates["loads" if policies else "skips the site"] += 1
        if not policies or repr(policies) in ran or len(ran) >= (100 if MUTANTS else 6):
            continue
        ran[repr(policies)] = None
        exact = dataclasses.replace(
            config,
            defaults=config.defaults.replace(alpha=(1.0,), alpha_slash=(1.0,)),
            entries=tuple(
                dataclasses.replace(e, overrides={**e.overrides, **{k: 1.0 for k in ("alpha", "alpha_slash") if k in e.overrides}})
                for e in config.entries
            ),
        )
        try:
            rewrite(path, out, exact, force=True)
        except GraphError:
            fates["refused rewrite"] += 1
            continue
        got = running.Session(out)(data)
        for name, value in expected.items():
            if value.ndim == 4:
                x, y = (v if v.shape[1] == 20 else v.swapaxes(1, 2) for v in (value, got[name]))
                assert running.largest_difference(x, y, real if x.shape[1] == 20 else np.ones(x.shape[:2], dtype=bool)) < 1e-5, changed
    print(dict(fates), len(ran))
    assert all(s and "\n" not in s for s in sentences)
    assert fates["refused"] > 100
    assert fates["loads"] > 50
    assert len(ran) >= 6
