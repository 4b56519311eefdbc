"""Rewrites of a graph that keep what it computes, up to rounding: other spellings of the same attention, mask and plumbing.

Each takes an `Editor` and says whether it found a place; `SAME` has them all by name.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto

from tests.graph_passes.graph_editor import Editor
from tests.graph_passes.test_frozen_mutants import rename

__all__ = ["SAME"]

AMONG_SCORES = ("identity", "cast", "cast like", "double", "dropout", "unsqueeze", "reshape", "zeros", "flat and back")
"""What exporters leave between the two products of an attention without a meaning."""

BOOL, FLOAT, INT64, DOUBLE = TensorProto.BOOL, TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE
FILLS = (float(np.finfo(np.float32).min), -1e9, -3e38, -65504.0)
"""What removes a score of the frozen models exactly: exp of it is 0 in float32. (-inf also makes NaN of rows that see no key.)"""


def _scaled(e: Editor) -> tuple[onnx.NodeProto, str, float] | None:
    """A Mul or Div of real numbers by a constant: the node, what it scales and the factor."""
    node = e.pick("Mul", "Div")
    if node is None or e.dtype(node.output[0]) != FLOAT:
        return None
    c = e.number(node.input[1])
    if c and abs(c) > 1e6:  # what a mask lowers by: a part of it may be infinite
        return None
    if c:
        return node, node.input[0], c if node.op_type == "Mul" else 1 / c
    c = e.number(node.input[0]) if node.op_type == "Mul" else None
    return (node, node.input[1], c) if c else None


def factor_in_two(e: Editor) -> bool:
    found = _scaled(e)
    if found is None:
        return False
    node, x, c = found
    part = e.choose([0.5, 4.0, 3.0, abs(c) ** 0.5])
    first = e.op(node, "Mul", x, e.const(part, np.float32))
    e.replace(node, e.op(node, "Mul", e.const([c / part], np.float32), first))
    return True


def factor_as_divisor(e: Editor) -> bool:
    found = _scaled(e)
    if found is None:
        return False
    node, x, c = found
    how = e.choose(["number", "root", "power", "computed", "vector"])
    if how == "power" and c > 0:
        divisor = e.op(node, "Pow", e.const(1 / c**2, np.float32), e.const(0.5, np.float32))
    elif how == "root" and c > 0:
        divisor = e.op(node, "Sqrt", e.const(1 / c**2, np.float32))
    elif how == "computed":
        divisor = e.op(node, "Div", e.const(1.0, np.float32), e.op(node, "Cast", e.const(c, np.float64), to=FLOAT, dtype=FLOAT))
    elif how == "vector":
        divisor = e.const([1 / c], np.float32)
    else:
        divisor = e.const(1 / c, np.float32)
    e.replace(node, e.op(node, "Div", x, divisor))
    return True


def factor_elsewhere(e: Editor) -> bool:
    """Part of the scale moves between queries, keys and scores; with a negative part on both sides too."""
    cores = e.cores()
    if not cores:
        return False
    product = e.random.choice(cores).product
    if e.dtype(product.output[0]) != FLOAT:
        return False
    a, b = e.choose([(2.0, 0.5), (0.25, 4.0), (-1.0, -1.0), (2.0, 1.0)])
    left = e.op(product, "Mul", product.input[0], e.const(a, np.float32))
    right = e.op(product, "Mul", product.input[1], e.const(b, np.float32))
    made = e.op(product, "MatMul", left, right)
    e.replace(product, made if a * b == 1 else e.op(product, "Div", made, e.const(a * b, np.float32)))
    return True


def swapped_operands(e: Editor) -> bool:
    node = e.pick("Add", "Mul", "And", "Or", "Equal", "Max", "Min")
    if node is None or len(node.input) != 2:
        return False
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return True


def difference_as_sum(e: Editor) -> bool:
    node = e.pick("Sub", "Add")
    if node is None or e.dtype(node.input[1]) not in (FLOAT, INT64) or e.number(node.input[0]) == 1:
        return False  # 1 - mask is what says that a mask holds 0 and 1
    other = "Add" if node.op_type == "Sub" else "Sub"
    e.replace(node, e.op(node, other, node.input[0], e.op(node, "Neg", node.input[1])))
    return True


def transposed_twice(e: Editor) -> bool:
    node = e.pick("Transpose")
    perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None) if node is not None else None
    if node is None or not perm:
        return False
    first = list(range(len(perm)))
    e.random.shuffle(first)
    second = [first.index(p) for p in perm]
    e.replace(node, e.op(node, "Transpose", e.op(node, "Transpose", node.input[0], perm=first), perm=second))
    return True


def product_as_einsum(e: Editor) -> bool:
    """Also with the transposition of keys inside."""
    cores = e.cores()
    if not cores:
        return False
    core = e.random.choice(cores)
    node = core.product if e.choose(["scores", "values"]) == "scores" else core.output
    shapes = [e.shape(i) for i in node.input]
    if any(s is None or len(s) != 4 for s in shapes) or shapes[0][1] != shapes[1][1]:  # type: ignore[index]
        return False
    swap = e.maker(node.input[1])
    if swap is not None and swap.op_type == "Transpose" and list(swap.attribute[0].ints) == [0, 1, 3, 2]:
        made = e.op(node, "Einsum", node.input[0], swap.input[0], equation=e.choose(["bhid,bhjd->bhij", "abcd, abed -> abce"]))
    else:
        made = e.op(node, "Einsum", *node.input, equation="bhik,bhkj->bhij")
    e.replace(node, made)
    return True


def fused_product(e: Editor) -> bool:
    """As ONNX Runtime writes it."""
    node = e.pick("MatMul")
    swap = e.maker(node.input[1]) if node is not None else None
    if node is None or swap is None or swap.op_type != "Transpose" or list(swap.attribute[0].ints) != [0, 1, 3, 2]:
        return False
    e.import_domain("com.microsoft")
    e.replace(node, e.op(node, "FusedMatMul", node.input[0], swap.input[0], domain="com.microsoft", transB=1, alpha=1.0))
    return True


def products_of_three_axes(e: Editor) -> bool:
    """Batch and heads in one axis, as baddbmm and bmm are exported."""
    cores = e.cores()
    if not cores:
        return False
    core = e.random.choice(cores)
    node = core.product if e.choose(["scores", "values"]) == "scores" else core.output
    a, b = (e.shape(i) for i in node.input)
    if a is None or b is None or len(a) != 4 or len(b) != 4 or a[1] != b[1] or not all(isinstance(x[1], int) for x in (a, b)):
        return False

    def three(x: str) -> str:
        shape = e.op(node, "Shape", x, dtype=INT64)
        rest = e.op(node, "Slice", shape, e.const([2]), e.const([4]))
        return e.op(node, "Reshape", x, e.op(node, "Concat", e.const([-1]), rest, axis=0))

    made = e.op(node, "MatMul", three(node.input[0]), three(node.input[1]))
    lengths = [
        e.op(node, "Slice", e.op(node, "Shape", x, dtype=INT64), e.const([i]), e.const([j]))
        for x, i, j in ((node.input[0], 0, 3), (node.input[1], 3, 4))
    ]
    e.replace(node, e.op(node, "Reshape", made, e.op(node, "Concat", *lengths, axis=0)))
    return True


def choice_turned(e: Editor) -> bool:
    node = e.pick("Where")
    if node is None:
        return False
    condition, then, other = node.input
    e.replace(node, e.op(node, "Where", e.op(node, "Not", condition), other, then))
    return True


def comparison_turned(e: Editor) -> bool:
    node = e.pick("LessOrEqual", "Less", "Greater", "GreaterOrEqual")
    if node is None:
        return False
    a, b = node.input
    whole = e.dtype(a) == INT64 and e.dtype(b) == INT64
    if node.op_type in ("Greater", "GreaterOrEqual"):
        a, b = b, a
    strict = node.op_type in ("Less", "Greater")
    ways: dict[str, Callable[[], str]] = {
        "mirror": lambda: e.op(node, "Greater" if strict else "GreaterOrEqual", b, a, dtype=BOOL),
        "not": lambda: e.op(node, "Not", e.op(node, "LessOrEqual" if strict else "Less", b, a, dtype=BOOL)),
    }
    if not strict:
        ways["or"] = lambda: e.op(node, "Or", e.op(node, "Less", a, b, dtype=BOOL), e.op(node, "Equal", a, b, dtype=BOOL))
    if whole:
        one = e.const(1)
        ways["next"] = lambda: (
            e.op(node, "LessOrEqual", e.op(node, "Add", a, one), b, dtype=BOOL)
            if strict
            else e.op(node, "Less", a, e.op(node, "Add", b, one), dtype=BOOL)
        )
        ways["difference"] = lambda: e.op(node, "Less" if strict else "LessOrEqual", e.op(node, "Sub", a, b), e.const(0), dtype=BOOL)
        ways["in floats"] = lambda: e.op(
            node, "Less" if strict else "LessOrEqual", *(e.op(node, "Cast", x, to=FLOAT, dtype=FLOAT) for x in (a, b)), dtype=BOOL
        )
        ways["in int32"] = lambda: e.op(
            node,
            "Less" if strict else "LessOrEqual",
            *(e.op(node, "Cast", x, to=TensorProto.INT32, dtype=TensorProto.INT32) for x in (a, b)),
            dtype=BOOL,
        )
        if strict:
            ways["smaller"] = lambda: e.op(
                node, "And", e.op(node, "LessOrEqual", a, b, dtype=BOOL), e.op(node, "Not", e.op(node, "Equal", a, b, dtype=BOOL))
            )
        else:
            ways["larger of both"] = lambda: e.op(node, "Equal", e.op(node, "Max", a, b), b, dtype=BOOL)
    e.replace(node, ways[e.choose(sorted(ways))]())
    return True


def conjunction_turned(e: Editor) -> bool:
    node = e.pick("And", "Or")
    if node is None:
        return False
    a, b = node.input
    both = node.op_type == "And"
    how = e.choose(["de morgan", "integers", "floats"])
    if how == "de morgan":
        made = e.op(node, "Not", e.op(node, "Or" if both else "And", e.op(node, "Not", a), e.op(node, "Not", b)))
    else:
        to = INT64 if how == "integers" else FLOAT
        x, y = (e.op(node, "Cast", t, to=to, dtype=to) for t in (a, b))
        made = e.op(node, "Cast", e.op(node, "Mul" if both else "Add", x, y), to=BOOL, dtype=BOOL)
    e.replace(node, made)
    return True


def negation_turned(e: Editor) -> bool:
    node = e.pick("Not")
    if node is None:
        return False
    x = node.input[0]
    how = e.choose(["xor", "equal", "one less"])
    if how == "xor":
        made = e.op(node, "Xor", x, e.const(True, bool))
    elif how == "equal":
        made = e.op(node, "Equal", x, e.const(False, bool))
    else:
        ones = e.op(node, "Cast", x, to=FLOAT, dtype=FLOAT)
        made = e.op(node, "Cast", e.op(node, "Sub", e.const(1.0, np.float32), ones), to=BOOL, dtype=BOOL)
    e.replace(node, made)
    return True


def truth_through_numbers(e: Editor) -> bool:
    """A condition as numbers and back."""
    place = e.edge(BOOL)
    if place is None or any(n.op_type == "IsNaN" for n in (e.maker(place[0].input[place[1]]),) if n is not None):
        return False  # a guard against NaN is one choice; nobody writes it through numbers
    node, k = place
    x = node.input[k]
    how = e.choose(["float", "int64", "int32", "half", "one", "twice", "where"])
    if how == "half":
        made = e.op(node, "Greater", e.op(node, "Cast", x, to=FLOAT, dtype=FLOAT), e.const(0.5, np.float32), dtype=BOOL)
    elif how == "one":
        made = e.op(node, "Equal", e.op(node, "Cast", x, to=INT64, dtype=INT64), e.const(1), dtype=BOOL)
    elif how == "twice":
        made = e.op(node, "And", x, x)
    elif how == "where":
        made = e.op(
            node, "Cast", e.op(node, "Where", x, e.const(1.0, np.float32), e.const(0.0, np.float32), dtype=FLOAT), to=BOOL, dtype=BOOL
        )
    else:
        to = {"float": FLOAT, "int64": INT64, "int32": TensorProto.INT32}[how]
        made = e.op(node, "Cast", e.op(node, "Cast", x, to=to, dtype=to), to=BOOL, dtype=BOOL)
    e.put(node, k, made)
    return True


def nothing_between(e: Editor) -> bool:
    """Operators that change nothing."""
    place = e.edge()
    if place is None or any(r.op_type == "IsNaN" for r in e.readers(place[0].input[place[1]])):
        return False  # the two readings of a guard are of one tensor
    node, k = place
    x, dtype = node.input[k], e.dtype(node.input[k])
    shape = e.shape(x)
    ways: dict[str, Callable[[], str]] = {
        "identity": lambda: e.op(node, "Identity", x),
        "cast": lambda: e.op(node, "Cast", x, to=dtype),
        "cast like": lambda: e.op(node, "CastLike", x, x),
        "concat of one": lambda: e.op(node, "Concat", x, axis=0),
    }
    if shape is not None and not shape:
        del ways["concat of one"]
    if shape is None:
        del ways["concat of one"]
    if dtype == FLOAT:
        ways["dropout"] = lambda: e.op(node, "Dropout", x)
        ways["double"] = lambda: e.op(node, "Cast", e.op(node, "Cast", x, to=DOUBLE, dtype=DOUBLE), to=FLOAT, dtype=FLOAT)
        ways["times one"] = lambda: e.op(node, "Mul", x, e.const(1.0, np.float32))
        ways["plus nothing"] = lambda: e.op(node, "Add", x, e.const(0.0, np.float32))
    if shape:
        rank = len(shape)
        score = e.is_score(x)  # rows and keys stay the last axes
        axis = e.random.randrange(rank - 1 if score else rank + 1)
        perm = list(range(rank))
        e.random.shuffle(perm)
        back = [perm.index(i) for i in range(rank)]
        ways["unsqueeze"] = lambda: e.op(node, "Squeeze", e.op(node, "Unsqueeze", x, e.const([axis])), e.const([axis]))
        if not score:
            ways["transpose"] = lambda: e.op(node, "Transpose", e.op(node, "Transpose", x, perm=perm), perm=back)
        ways["reshape"] = lambda: e.op(node, "Reshape", x, e.op(node, "Shape", x, dtype=INT64))
        ways["zeros"] = lambda: e.op(node, "Reshape", x, e.const([0] * rank))
        ways["expand"] = lambda: e.op(node, "Expand", x, e.op(node, "Shape", x, dtype=INT64))
        ways["expand by one"] = lambda: e.op(node, "Expand", x, e.const([1]))
        ways["tile"] = lambda: e.op(node, "Tile", x, e.const([1] * rank))
        ways["slice"] = lambda: e.op(node, "Slice", x, e.const([0]), e.const([2**63 - 1]), e.const([rank - 1]))
        ways["flat and back"] = lambda: e.op(node, "Reshape", e.op(node, "Reshape", x, e.const([-1])), e.op(node, "Shape", x, dtype=INT64))
    names = sorted(ways) if not e.is_score(x) else [w for w in sorted(ways) if w in AMONG_SCORES]
    e.put(node, k, ways[e.choose(names)]())
    return True


def constant_as_node(e: Editor) -> bool:
    """Initialisers as Constant nodes, or the other way round."""
    if e.random.random() < 0.5:
        small = [t for t in e.graph.initializer if 0 < len(t.raw_data) <= 64]
        if not small:
            return False
        tensor = e.random.choice(small)
        node = onnx.helper.make_node("Constant", [], [tensor.name], name=f"constant.{tensor.name}", value=tensor)
        e.graph.initializer.remove(tensor)
        e.graph.node.insert(0, node)
        return True
    nodes = [n for n in e.nodes("Constant") if n.attribute[0].HasField("t")]
    if not nodes:
        return False
    node = e.random.choice(nodes)
    tensor = onnx.TensorProto.FromString(node.attribute[0].t.SerializeToString())
    tensor.name = node.output[0]
    e.graph.node.remove(node)
    e.graph.initializer.append(tensor)
    return True


def number_with_axes(e: Editor) -> bool:
    """A constant number as a tensor of one element, or the other way round."""
    node = e.pick("Add", "Mul", "Div", "Sub", "Where", "Less", "Greater", "Equal", "LessOrEqual", "GreaterOrEqual")
    if node is None:
        return False
    rank = max((len(e.shape(i) or ()) for i in node.input), default=0)
    for k, name in enumerate(node.input):
        array = e.array(name)
        if array is not None and array.size == 1 and rank:
            axes = e.choose([0, 1, rank])
            e.put(node, k, e.const(array.reshape((1,) * axes), array.dtype))
            return True
    return False


def reshape_lengths(e: Editor) -> bool:
    """-1 for a fixed length, or 0 for one that stays."""
    node = e.pick("Reshape")
    target = e.array(node.input[1]) if node is not None else None
    source = e.shape(node.input[0]) if node is not None else None
    if node is None or target is None or source is None or node.attribute:
        return False
    new = target.copy()
    stays = [i for i, n in enumerate(target) if i < len(source) and n > 0 and n == source[i]]
    if stays and e.random.random() < 0.6:
        new[e.random.choice(stays)] = 0
    elif -1 not in target and (target > 0).any():
        new[e.random.choice(list(np.flatnonzero(target > 0)))] = -1
    elif (target == -1).sum() == 1 and isinstance((e.shape(node.output[0]) or [""] * 9)[int(np.argmin(target))], int):
        new[int(np.argmin(target))] = e.shape(node.output[0])[int(np.argmin(target))]  # type: ignore[index]
    else:
        return False
    e.put(node, 1, e.const(new))
    return True


def axes_by_reshape(e: Editor) -> bool:
    """Unsqueeze as Reshape to a computed or a constant shape."""
    node = e.pick("Unsqueeze")
    axes = e.array(node.input[1]) if node is not None else None
    shape = e.shape(node.input[0]) if node is not None else None
    if node is None or axes is None or shape is None:
        return False
    rank = len(shape) + len(axes)
    new = sorted(int(a) % rank for a in axes)
    lengths = e.op(node, "Shape", node.input[0], dtype=INT64)
    parts, k = [], 0
    for axis in range(rank):
        if axis in new:
            parts.append(e.const([1]))
        else:
            parts.append(e.op(node, "Slice", lengths, e.const([k]), e.const([k + 1])))
            k += 1
    e.replace(node, e.op(node, "Reshape", node.input[0], e.op(node, "Concat", *parts, axis=0)))
    return True


def axis_from_the_end(e: Editor) -> bool:
    node = e.pick("Softmax", "Concat", "Gather", "Split")
    attribute = next((a for a in node.attribute if a.name == "axis"), None) if node is not None else None
    shape = e.shape(node.input[0]) if node is not None else None
    if node is None or attribute is None or shape is None:
        return False
    attribute.i = attribute.i - len(shape) if attribute.i >= 0 else attribute.i + len(shape)
    return True


def softmax_in_parts(e: Editor) -> bool:
    node = e.pick("Softmax")
    shape = e.shape(node.input[0]) if node is not None else None
    if node is None or shape is None:
        return False
    axis = e.choose([-1, len(shape) - 1])
    x = node.input[0]
    highest = e.op(node, "ReduceMax", x, e.const([axis]), keepdims=1) if e.opset >= 18 else e.op(node, "ReduceMax", x, axes=[axis])
    x = e.op(node, "Sub", x, highest)
    exp = e.op(node, "Exp", x)
    total = e.op(node, "ReduceSum", exp, e.const([axis]), keepdims=1)
    inverse = e.choose(["div", "mul"]) == "mul"
    made = e.op(node, "Mul", exp, e.op(node, "Reciprocal", total)) if inverse else e.op(node, "Div", exp, total)
    e.replace(node, made)
    return True


def heads_repeated_otherwise(e: Editor) -> bool:
    """Unsqueeze, Expand, Reshape as Tile, as Concat of copies, or as Gather of heads."""
    places = []
    for expand in e.nodes("Expand"):
        before, after = e.maker(expand.input[0]), e.readers(expand.output[0])
        shape, wide = e.shape(expand.input[0]), e.shape(expand.output[0])
        if before is None or shape is None or wide is None or len(shape) != 5 or len(wide) != 5:
            continue
        if before.op_type == "Unsqueeze" and [r.op_type for r in after] == ["Reshape"] and shape[2] == 1 and isinstance(wide[2], int):
            places.append((expand, before, after[0], wide[2], shape[1]))
    if not places:
        return False
    expand, before, reshape, count, heads = e.random.choice(places)
    how = e.choose(["tile", "concat", "gather", "concat of heads"])
    if how == "tile":
        e.replace(expand, e.op(expand, "Tile", expand.input[0], e.const([1, 1, count, 1, 1])))
    elif how == "concat":
        e.replace(expand, e.op(expand, "Concat", *[expand.input[0]] * count, axis=2))
    elif how == "gather" and isinstance(heads, int):
        e.replace(reshape, e.op(reshape, "Gather", before.input[0], e.const(np.repeat(np.arange(heads), count)), axis=1))
    elif isinstance(heads, int):
        each = [
            e.op(reshape, "Slice", before.input[0], e.const([h]), e.const([h + 1]), e.const([1]))
            for h in range(heads)
            for _ in range(count)
        ]
        e.replace(reshape, e.op(reshape, "Concat", *each, axis=1))
    return True


def _mask_added(e: Editor) -> tuple[onnx.NodeProto, str, str] | None:
    """An Add of scores and a mask: the node, the scores and the mask."""
    found = []
    for core in e.cores():
        adder = e.maker(core.softmax.input[0])
        if adder is not None and adder.op_type == "Add" and e.dtype(adder.output[0]) == FLOAT:
            x, mask = adder.input
            if e.leads_to_product(mask):
                x, mask = mask, x
            found.append((adder, x, mask))
    return e.random.choice(found) if found else None


def mask_by_choice(e: Editor) -> bool:
    """score + Where(m, 0, low) as Where(m, score, low)."""
    found = _mask_added(e)
    if found is None:
        return False
    node, x, mask = found
    chooser = e.maker(mask)
    if chooser is None or chooser.op_type != "Where" or e.number(chooser.input[1]) != 0:
        return False
    fill = e.const(e.choose(FILLS), np.float32)
    e.replace(node, e.op(node, "Where", chooser.input[0], x, fill, dtype=FLOAT))
    return True


def mask_by_comparison(e: Editor) -> bool:
    """An added mask as the choice of where it is 0."""
    found = _mask_added(e)
    if found is None:
        return False
    node, x, mask = found
    how = e.choose(["equal", "larger", "minus"])
    zero = e.const(0.0, np.float32)
    fill = e.const(e.choose(FILLS), np.float32)
    if how == "equal":
        made = e.op(node, "Where", e.op(node, "Equal", mask, zero, dtype=BOOL), x, fill, dtype=FLOAT)
    elif how == "larger":
        made = e.op(node, "Where", e.op(node, "Less", mask, zero, dtype=BOOL), fill, x, dtype=FLOAT)
    else:
        made = e.op(node, "Sub", x, e.op(node, "Neg", mask))
    e.replace(node, made)
    return True


def mask_as_numbers(e: Editor) -> bool:
    """Where(m, 0, low) as (1 - m) * low or Not(m) * low."""
    places = [
        n for n in e.nodes("Where") if e.number(n.input[1]) == 0 and (e.number(n.input[2]) or 0) <= -1e4 and e.dtype(n.input[0]) == BOOL
    ]
    places = [n for n in places if e.dtype(n.output[0]) == FLOAT]
    if not places:
        return False
    node = e.random.choice(places)
    low = e.const(e.choose(FILLS), np.float32)
    if e.random.random() < 0.5:
        hidden = e.op(node, "Cast", e.op(node, "Not", node.input[0]), to=FLOAT, dtype=FLOAT)
    else:
        hidden = e.op(node, "Sub", e.const(1.0, np.float32), e.op(node, "Cast", node.input[0], to=FLOAT, dtype=FLOAT))
    e.replace(node, e.op(node, "Mul", hidden, low))
    return True


def mask_by_heads(e: Editor) -> bool:
    """The mask is expanded to the full shape of the scores."""
    found = _mask_added(e)
    if found is None:
        return False
    node, x, mask = found
    wide = e.op(node, "Expand", mask, e.op(node, "Shape", x, dtype=INT64))
    e.put(node, list(node.input).index(mask), wide)
    return True


def causal_again(e: Editor) -> bool:
    """A second, equal causal condition on the scores: by Less, by Trilu, or by a running count."""
    cores = e.cores()
    if not cores:
        return False
    node = e.random.choice(cores).softmax
    x = node.input[0]
    kv, q = e.grid(node, x)
    how = e.choose(["compare", "trilu", "count", "buffer"])
    if how == "compare":
        seen = e.op(node, "Less", kv, e.op(node, "Add", q, e.const(1)), dtype=BOOL)
    else:
        shape = e.op(node, "Shape", x, dtype=INT64)
        tail = e.op(node, "Slice", shape, e.const([-2]), e.const([2**31]))
        rows, keys = (e.op(node, "Gather", shape, e.const(k), axis=0) for k in (-2, -1))
        behind = e.op(node, "Sub", keys, rows)
        ones = e.op(node, "Expand", e.const(1.0, np.float32), tail, dtype=FLOAT)
        if how == "trilu":
            seen = e.op(node, "Cast", e.op(node, "Trilu", ones, behind, upper=0), to=BOOL, dtype=BOOL)
        elif how == "count":
            kept = e.op(node, "Expand", e.const(1), tail, dtype=INT64)
            column = e.op(node, "CumSum", kept, e.const(-1), exclusive=1)
            row = e.op(node, "Add", e.op(node, "CumSum", kept, e.const(-2), exclusive=1), behind)
            seen = e.op(node, "LessOrEqual", column, row, dtype=BOOL)
        else:
            buffer = e.const(np.tril(np.ones((96, 96), bool)), bool)
            part = e.op(
                node,
                "Slice",
                buffer,
                e.op(node, "Unsqueeze", behind, e.const([0])),
                e.op(node, "Unsqueeze", keys, e.const([0])),
                e.const([0]),
            )
            seen = e.op(node, "Slice", part, e.const([0]), e.op(node, "Unsqueeze", keys, e.const([0])), e.const([1]))
    e.put(node, 0, e.op(node, "Where", seen, x, e.const(e.choose(FILLS), np.float32), dtype=e.dtype(x)))
    return e.dtype(x) == FLOAT


def range_otherwise(e: Editor) -> bool:
    node = e.pick("Range")
    if node is None or e.dtype(node.output[0]) != INT64:
        return False
    start, limit, delta = node.input
    if e.array(delta) is None or int(e.array(delta).reshape(())) != 1:  # type: ignore[union-attr]
        return False
    length = e.op(node, "Sub", limit, start)
    how = e.choose(["shifted", "counted"])
    vector = e.op(node, "Unsqueeze", length, e.const([0])) if e.shape(limit) == [] else e.op(node, "Reshape", length, e.const([1]))
    if how == "shifted":
        made = e.op(node, "Range", e.const(0), length, delta)
    else:
        made = e.op(node, "CumSum", e.op(node, "Expand", e.const([1]), vector), e.const(0), exclusive=1)
    e.replace(node, e.op(node, "Add", made, start))
    return True


def length_otherwise(e: Editor) -> bool:
    """Shape(start, end) as a Slice or a Gather of the whole shape."""
    node = e.pick("Shape")
    values = {a.name: a.i for a in node.attribute} if node is not None else {}
    if node is None or "end" not in values:
        return False
    whole = e.op(node, "Shape", node.input[0], dtype=INT64)
    start = values.get("start", 0)
    if values["end"] == start + 1 and e.random.random() < 0.5:
        e.replace(node, e.op(node, "Gather", whole, e.const([start]), axis=0))
    else:
        e.replace(node, e.op(node, "Slice", whole, e.const([start]), e.const([values["end"]])))
    return True


def number_of_one_element(e: Editor) -> bool:
    """Squeeze to a number as Reshape or as Gather."""
    node = e.pick("Squeeze")
    if node is None or e.shape(node.input[0]) != [1]:
        return False
    if e.random.random() < 0.5:
        e.replace(node, e.op(node, "Reshape", node.input[0], e.const(np.zeros(0))))
    else:
        e.replace(node, e.op(node, "Gather", node.input[0], e.const(0), axis=0))
    return True


def factor_after_mask(e: Editor) -> bool:
    """(scores + mask) * c, as CodeGen does."""
    found = _mask_added(e)
    scaled = e.maker(found[1]) if found is not None else None
    c = e.number(scaled.input[1]) if scaled is not None and scaled.op_type == "Mul" else None
    if found is None or scaled is None or not c or not 0 < c <= 1:
        return False
    node, _, mask = found
    e.replace(node, e.op(node, "Mul", e.op(node, "Add", scaled.input[0], mask), e.const(c, np.float32)))
    return True


def clamped_below(e: Editor) -> bool:
    """Masked scores are at least the lowest number, as older OPT and GPT-2 have it."""
    cores = e.cores()
    if not cores:
        return False
    node = e.random.choice(cores).softmax
    if e.dtype(node.input[0]) != FLOAT:
        return False
    low = e.const(np.finfo(np.float32).min, np.float32)
    how = e.choose(["max", "clip"])
    e.put(node, 0, e.op(node, "Max", node.input[0], low) if how == "max" else e.op(node, "Clip", node.input[0], low))
    return True


def softmax_of_three_axes(e: Editor) -> bool:
    node = e.pick("Softmax")
    shape = e.shape(node.input[0]) if node is not None else None
    if node is None or shape is None or len(shape) != 4:
        return False
    whole = e.op(node, "Shape", node.input[0], dtype=INT64)
    rest = e.op(node, "Slice", whole, e.const([2]), e.const([4]))
    flat = e.op(node, "Reshape", node.input[0], e.op(node, "Concat", e.const([-1]), rest, axis=0))
    e.replace(node, e.op(node, "Reshape", e.op(node, "Softmax", flat, axis=e.choose([-1, 2])), whole))
    return True


def mask_in_two(e: Editor) -> bool:
    """Where(a and b, 0, low) as the sum or the smaller of two."""
    places = [n for n in e.nodes("Where") if e.number(n.input[1]) == 0 and (e.number(n.input[2]) or 0) <= -1e4]
    places = [n for n in places if getattr(e.maker(n.input[0]), "op_type", "") == "And" and e.dtype(n.output[0]) == FLOAT]
    if not places:
        return False
    node = e.random.choice(places)
    both = e.maker(node.input[0])
    assert both is not None
    zero, low = e.const(0.0, np.float32), e.const(-1e9, np.float32)
    parts = [e.op(node, "Where", condition, zero, low, dtype=FLOAT) for condition in both.input]
    e.replace(node, e.op(node, e.choose(["Add", "Min"]), *parts))
    return True


def projection_as_gemm(e: Editor) -> bool:
    """x W of three axes as Gemm of two."""
    node = e.pick("MatMul")
    weight = e.array(node.input[1]) if node is not None else None
    shape = e.shape(node.input[0]) if node is not None else None
    if node is None or weight is None or weight.ndim != 2 or shape is None or len(shape) != 3 or weight.dtype != np.float32:
        return False
    rows, columns = weight.shape
    flat = e.op(node, "Reshape", node.input[0], e.const([-1, rows]))
    turned = e.choose([0, 1])
    product = e.op(node, "Gemm", flat, e.const(weight.T if turned else weight, np.float32), transB=turned)
    front = e.op(node, "Slice", e.op(node, "Shape", node.input[0], dtype=INT64), e.const([0]), e.const([2]))
    e.replace(node, e.op(node, "Reshape", product, e.op(node, "Concat", front, e.const([columns]), axis=0)))
    return True


def transposes_merged(e: Editor) -> bool:
    places = []
    for node in e.nodes("Transpose"):
        before = e.maker(node.input[0])
        if before is not None and before.op_type == "Transpose" and before.attribute and node.attribute:
            places.append((node, before))
    if not places:
        return False
    node, before = e.random.choice(places)
    first, second = (list(n.attribute[0].ints) for n in (before, node))
    e.replace(node, e.op(node, "Transpose", before.input[0], perm=[first[p] for p in second]))
    return True


def computed_once(e: Editor) -> bool:
    """Nodes that compute the same become one, as an optimiser does it."""
    first: dict[bytes, str] = {}
    renamed: dict[str, str] = {}
    outputs = {o.name for o in e.graph.output}
    for node in list(e.graph.node):
        node.input[:] = [renamed.get(i, i) for i in node.input]
        if len(node.output) != 1 or node.output[0] in outputs or any(a.HasField("g") for a in node.attribute):
            continue
        key = onnx.NodeProto.FromString(node.SerializeToString())
        key.ClearField("output"), key.ClearField("name")
        same = first.setdefault(key.SerializeToString(deterministic=True), node.output[0])
        if same != node.output[0]:
            renamed[node.output[0]] = same
            e.graph.node.remove(node)
    return bool(renamed)


def other_names(e: Editor) -> bool:
    rename(e.model, e.random)
    return True


def computed_twice(e: Editor) -> bool:
    """A node with several readers is copied for one of them."""
    place = e.edge()
    if place is None:
        return False
    reader, k = place
    node = e.maker(reader.input[k])
    if node is None or len(node.output) != 1 or len(e.readers(node.output[0])) < 2 or any(a.HasField("g") for a in node.attribute):
        return False
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    e.put(reader, k, e.op(reader, node.op_type, *node.input, dtype=e.dtype(node.output[0]), domain=node.domain, **attributes))
    return True


def other_order(e: Editor) -> bool:
    e.shuffle()
    return True


SAME: dict[str, Callable[[Editor], bool]] = {
    f.__name__: f
    for f in (
        *(factor_in_two, factor_as_divisor, factor_elsewhere, swapped_operands, difference_as_sum, transposed_twice, product_as_einsum),
        *(fused_product, products_of_three_axes, choice_turned, comparison_turned, conjunction_turned, negation_turned),
        *(truth_through_numbers, nothing_between, constant_as_node, number_with_axes, reshape_lengths, axes_by_reshape, axis_from_the_end),
        *(softmax_in_parts, heads_repeated_otherwise, mask_by_choice, mask_by_comparison, mask_as_numbers),
        *(mask_by_heads, causal_again, range_otherwise, length_otherwise, number_of_one_element, computed_twice, other_order),
        *(
            factor_after_mask,
            clamped_below,
            softmax_of_three_axes,
            mask_in_two,
            projection_as_gemm,
            transposes_merged,
            computed_once,
            other_names,
        ),
    )
}
