"""Attention spelled with Softmax: `MatMul(Q, K^T) -> ... -> Softmax -> ... -> MatMul(V)`.

From each Softmax, back over an allow-list to the one product of queries and keys, and forward to the one product with the
values. On the way back:

1. a scalar factor (`Mul`, `Div`), before or after the mask; factors on Q and K count too, all are multiplied into `scale`;
2. a mask: `Add`, `Sub`, `Where(mask, score, fill)` or `Where(mask, fill, score)`; and `Mul(score, mask)` of 0 and 1 in front of one of
   those that removes what it makes 0;
3. one `Tanh` before every mask: the soft-cap `c * tanh(x)` with c the factors after it;
4. float casts (softmax in float32), `Identity`, the shift `x - ReduceMax(x)`, which softmax does not feel, and a lower bound (`Max`,
   `Clip`) at the least number of the type, which only -inf is below;
5. `Reshape`, `Squeeze` and `Unsqueeze` of the axes in front of rows and keys.

On the way forward: casts, `Identity`, reshapes, and `Where(c, x, p)` for a condition c that no probability meets: the NaN guard
`Where(IsNaN(p), 0, p)`, and infinities; and a mask that makes probabilities 0 (`Where`, `Mul`) which are 0 already. Q, K and V are
opaque tensors. Any other node, any other consumer and a graph output on the way decline the site with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import onnx
import onnx_graphsurgeon as gs

from graph_passes.patterns.axes import Axes, carried, measured
from graph_passes.patterns.layout import operands, scalar_factor
from graph_passes.patterns.masks import MaskTerm, decide
from graph_passes.site import AttentionSite, Refusal, label
from graph_passes.symbolic.graph import SymbolicGraph, is_standard, op_names, producer

__all__ = ["Core", "find_core", "is_attention", "matches", "measure", "pattern", "site"]

_REASONS = {
    "Concat": "a column is joined to its scores (an attention sink), which full attention does not have.",
    "Einsum": "its scores are an Einsum that is not one product of queries and keys.",
}
_WEIGHTED = "its scores are a product with a stored weight, not of queries and keys (a router, a classifier, or heads that are mixed)."
_LOWEST = {
    onnx.TensorProto.FLOAT16: -65504.0,
    onnx.TensorProto.BFLOAT16: -(2 - 2**-7) * 2.0**127,
    onnx.TensorProto.FLOAT: -(2 - 2**-23) * 2.0**127,
}
_RESHAPES = op_names("Reshape Squeeze Unsqueeze Flatten")


@dataclass
class Core:
    """The nodes of one attention, from the product of queries and keys to the product with the values."""

    softmax: gs.Node
    scores: gs.Node
    output: gs.Node
    factor: float = 1.0
    softcap: float = 0.0
    terms: list[MaskTerm] = field(default_factory=list)
    between: list[gs.Node] = field(default_factory=list)
    path: list[gs.Node] = field(default_factory=list)
    """From the product of queries and keys, without it, to the product with the values, without it."""


def pattern(node: gs.Node) -> str:
    return "softmax core"


def matches(node: gs.Node) -> bool:
    """Every Softmax is a candidate."""
    return node.op == "Softmax" and is_standard(node)


def is_attention(sg: SymbolicGraph, softmax: gs.Node) -> bool:
    """Whether a product of two computed tensors feeds the Softmax (a router or a classifier multiplies by a weight)."""
    return _find_product(sg, softmax.inputs[0], {}) is not None


def _refuse_what_is_no_attention(sg: SymbolicGraph, softmax: gs.Node) -> None:
    seen: dict[int, gs.Node] = {}
    if _find_product(sg, softmax.inputs[0], seen) is None:
        weighted = next((n for n in seen.values() if n.op in ("MatMul", "Gemm", "Einsum")), None)
        if weighted is not None:
            raise Refusal(_WEIGHTED, label(weighted))
        raise Refusal("no product of queries and keys feeds it (a router, a gate or a classifier).", label(softmax))


def find_core(sg: SymbolicGraph, softmax: gs.Node) -> Core:
    """The nodes of the attention around a Softmax.

    Raises:
        Refusal: a node on the way is not on the allow-list, or something else reads what lies between.
    """
    rank = len(sg.shape(softmax.outputs[0]) or ())
    axis = int(softmax.attrs.get("axis", -1 if sg.opset >= 13 else 1))
    if rank == 0:
        raise Refusal("the number of axes of its scores is not known; export the model with shapes, or infer them.", label(softmax))
    if axis not in (-1, rank - 1):
        raise Refusal(f"its Softmax runs over axis {axis}, not over the keys (the last axis).", label(softmax))
    core = _back(sg, softmax)
    output, after = _forward(sg, softmax, core.terms)
    core.output = output
    core.between += [softmax, *after]
    core.path += [softmax, *after]
    _refuse_other_readers(sg, core)
    return core


def site(sg: SymbolicGraph, softmax: gs.Node, name: str) -> AttentionSite:
    """The site around a Softmax.

    Raises:
        Refusal: it is not full causal attention, or that is not proved.
    """
    _refuse_what_is_no_attention(sg, softmax)
    core = find_core(sg, softmax)
    axes = measure(sg, core)
    grid = axes.grid
    output = core.output.outputs[0]
    q_tensor, k_tensor = core.scores.inputs
    v_tensor = core.output.inputs[1]
    query, key, value = operands(
        sg,
        grid,
        (q_tensor, axes.read(sg, q_tensor, grid.q, grid.d)),
        (k_tensor, axes.read(sg, k_tensor, grid.d, grid.kv)),
        (v_tensor, axes.read(sg, v_tensor, grid.kv, grid.w)),
        output,
        core.scores,
    )
    mask, evidence = decide(sg, axes.placed(core.terms), grid)
    scale = core.factor * query.factor * key.factor
    if not scale > 0:
        raise Refusal(f"its scores are multiplied by {scale:g}; a factor > 0 is needed.", label(core.scores))
    facts = [f"scale {scale:.9g} is the product of all factors on queries, keys and scores."]
    if core.softcap:
        scale *= core.softcap
        facts = [f"soft-cap {core.softcap:.9g} * tanh(score / {core.softcap:.9g}) of scores with scale {scale:.9g}, before the mask."]
    heads = grid.heads.value or 0
    if heads != key.operand.heads:
        facts.append(
            f"each key/value head is repeated {heads // key.operand.heads} times before the product; {key.operand.tensor} holds them once."
        )
    nodes = [*core.between, core.scores, core.output, *query.through, *key.through, *value.through]
    return AttentionSite(
        id=name,
        node=softmax.name or softmax.outputs[0].name,
        pattern=pattern(softmax),
        query=query.operand,
        key=key.operand,
        value=value.operand,
        output=output.name,
        mask=mask,
        heads=heads,
        kv_heads=key.operand.heads,
        head_size=grid.size.value or 0,
        value_size=grid.value_size.value or 0,
        scale=scale,
        softcap=core.softcap,
        opset=sg.opset,
        consumed=tuple(dict.fromkeys(label(n) for n in nodes)),
        between=tuple(dict.fromkeys(t.name for n in nodes if n is not core.output for t in n.outputs)),
        evidence=(*evidence, *facts),
        lead=axes.output_lead(),
        cast=None if query.dtype == sg.dtype(output) else sg.dtype(output),
    )


def _back(sg: SymbolicGraph, softmax: gs.Node) -> Core:
    """The way from the softmax back to the product; what follows the softmax is still open."""
    tensor = softmax.inputs[0]
    core = Core(softmax, softmax, softmax)
    while True:
        node = producer(tensor)
        if node is None:
            raise Refusal(f"no product of queries and keys feeds it: its scores come from {tensor.name}.", label(softmax))
        if node.op == "MatMul" and is_standard(node):
            if any(_is_stored(t) for t in node.inputs):
                raise Refusal(_WEIGHTED, label(node))
            core.scores = node
            core.path.reverse()
            return core
        if not is_standard(node) or node.op in _REASONS:
            raise Refusal(_REASONS.get(node.op, f"{node.domain}.{node.op} between the scores and Softmax is not understood."), label(node))
        tensor = _step_back(sg, node, core)
        core.between.append(node)
        core.path.append(node)


def _step_back(sg: SymbolicGraph, node: gs.Node, core: Core) -> gs.Tensor:
    """The scores that a node on the way was made from; what it does to them is added to the core."""
    scaled = scalar_factor(sg, node)
    if scaled is not None:
        core.factor *= scaled[1]
        return scaled[0]
    if node.op in ("Cast", "CastLike", "Identity", *_RESHAPES):
        return node.inputs[0]
    if _is_shift(sg, node):
        core.between.append(node.inputs[1].inputs[0])
        return node.inputs[0]
    unclamped = _unclamped(sg, node)
    if unclamped is not None:
        return unclamped
    if node.op == "Tanh":
        if core.softcap:
            raise Refusal("its scores go through Tanh twice, which one soft-cap is not.", label(node))
        if not core.factor > 0:
            raise Refusal(f"the Tanh of its scores is multiplied by {core.factor:g}; a soft-cap > 0 is needed.", label(node))
        core.softcap, core.factor = core.factor, 1.0
        return node.inputs[0]
    if core.softcap and node.op in ("Add", "Sub", "Where"):
        raise Refusal("its mask is applied before the soft-cap, which would cap it too; the operator masks after it.", label(node))
    if node.op in ("Add", "Sub", "Where") and any(t.how == "multiply" for t in core.terms):
        raise Refusal("scores that are masked already are multiplied by a mask, which may bring them back.", label(core.terms[-1].node))
    if node.op == "Mul":
        scores, mask = _scores_and_mask(sg, node)
        core.terms.append(MaskTerm("multiply", mask, node))
        return scores
    if node.op in ("Add", "Sub"):
        scores, mask = _scores_and_mask(sg, node)
        core.terms.append(MaskTerm("add", mask, node, factor=-core.factor if node.op == "Sub" else core.factor))
        return scores
    if node.op == "Where":
        condition, then, other = node.inputs
        reached = [t for t in (then, other) if _find_product(sg, t, {}) is not None]
        if len(reached) != 1:
            raise Refusal("a Where before Softmax does not choose between scores and a fill value.", label(node))
        how, fill = ("where", other) if reached[0] is then else ("unless", then)
        core.terms.append(MaskTerm(how, condition, node, fill=fill, factor=core.factor))
        return reached[0]
    raise Refusal(f"{label(node).split()[0]} between the scores and Softmax is not part of full attention.", label(node))


def _unclamped(sg: SymbolicGraph, node: gs.Node) -> gs.Tensor | None:
    """x of `Max(x, c)` or `Clip(x, c)` with c not above the lowest number: only -inf, which removes a score, becomes c, which does so too."""
    if node.op not in ("Max", "Clip") or len(node.inputs) < 2:
        return None
    lowest = _LOWEST.get(sg.dtype(node.outputs[0]) or 0, -math.inf)
    present = [t for t in node.inputs if t.name]
    numbers = [sg.scalar(t) for t in present]
    kept = [t for t, c in zip(present, numbers, strict=True) if c is None]
    if len(present) != 2 or len(kept) != 1 or (node.op == "Clip" and (kept[0] is not node.inputs[0] or not node.inputs[1].name)):
        return None
    (bound,) = (c for c in numbers if c is not None)
    return kept[0] if bound <= lowest else None


def _is_shift(sg: SymbolicGraph, node: gs.Node) -> bool:
    """`x - ReduceMax(x)` over the keys."""
    if node.op != "Sub":
        return False
    scores, highest = node.inputs
    by = producer(highest)
    if by is None or by.op != "ReduceMax" or by.inputs[0] is not scores or not by.attrs.get("keepdims", 1):
        return False
    axes = by.attrs.get("axes") or (sg.constant_integers(by.inputs[1]) if len(by.inputs) > 1 else None)
    return axes is not None and [int(a) for a in axes] in ([-1], [len(sg.known_shape(scores)) - 1])


def _scores_and_mask(sg: SymbolicGraph, node: gs.Node) -> tuple[gs.Tensor, gs.Tensor]:
    left, right = node.inputs
    reaches = [_find_product(sg, t, {}) is not None for t in (left, right)]
    if reaches[0] and (node.op == "Sub" or not reaches[1]):
        return left, right
    if reaches[1] and not reaches[0] and node.op != "Sub":
        return right, left
    raise Refusal(f"it cannot be told which input of {node.op} holds the scores and which the mask.", label(node))


_ON_THE_WAY = op_names(
    "Cast CastLike Identity Add Sub Mul Div Where Tanh Reshape Concat Slice Unsqueeze Squeeze Flatten Neg "
    "Max Min Clip Relu LeakyRelu Sigmoid Softplus Abs Pow Exp Transpose Expand"
)


def _find_product(sg: SymbolicGraph, tensor: gs.Tensor, seen: dict[int, gs.Node]) -> gs.Node | None:
    """A product of two computed tensors that a tensor of scores comes from; `seen` takes the nodes that were looked at."""
    node = producer(tensor)
    if node is None or id(node) in seen:
        return None
    seen[id(node)] = node
    if node.op in ("MatMul", "FusedMatMul", "Einsum"):
        return None if any(_is_stored(t) for t in node.inputs) else node
    if node.op not in _ON_THE_WAY or not is_standard(node):
        return None
    return next((found for t in node.inputs if (found := _find_product(sg, t, seen)) is not None), None)


_OF_A_WEIGHT = op_names("Transpose Cast Identity DequantizeLinear Unsqueeze Squeeze Reshape")


def _is_stored(tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    if node is None:
        return isinstance(tensor, gs.Constant)
    return node.op == "Constant" or (node.op in _OF_A_WEIGHT and _is_stored(node.inputs[0]))


def _forward(sg: SymbolicGraph, softmax: gs.Node, terms: list[MaskTerm]) -> tuple[gs.Node, list[gs.Node]]:
    """The product with the values and the nodes on the way to it; the masks of probabilities there are added to `terms`."""
    tensor = softmax.outputs[0]
    passed: list[gs.Node] = []
    held = [tensor]
    while True:
        readers = sg.readers(tensor)
        guard = _guard(sg, tensor, held)
        if guard:
            passed += guard
            tensor = guard[-1].outputs[0]
            held.append(tensor)
        elif len({id(n) for n in readers}) != 1:
            names = ", ".join(label(n) for n in readers) or "nothing"
            raise Refusal(f"its probabilities are read by {names}; only the product with the values may read them.", label(softmax))
        elif readers[0].op == "MatMul" and readers[0].inputs[0] is tensor and readers[0].inputs[1] is not tensor:
            return readers[0], passed
        elif (
            readers[0].op in ("Cast", "CastLike", "Identity", "Dropout", *_RESHAPES)
            and readers[0].inputs[0] is tensor
            and is_standard(readers[0])
            and not _training(sg, readers[0])
        ):
            passed.append(readers[0])
            tensor = readers[0].outputs[0]
            held = [tensor] if readers[0].op in _RESHAPES else [*held, tensor]
        elif (masked := _mask_of_probabilities(sg, readers[0], tensor)) is not None:
            terms.append(masked)
            passed.append(readers[0])
            tensor = readers[0].outputs[0]
            held.append(tensor)
        else:
            name = label(readers[0])
            raise Refusal(f"its probabilities go through {name.split()[0]}, which is not part of full attention.", name)


def _mask_of_probabilities(sg: SymbolicGraph, node: gs.Node, tensor: gs.Tensor) -> MaskTerm | None:
    """`Where(mask, p, 0)`, `Where(mask, 0, p)` or `p * mask`."""
    if not is_standard(node) or sum(t is tensor for t in node.inputs) != 1:
        return None
    if node.op == "Mul":
        return MaskTerm("multiply", node.inputs[0] if node.inputs[1] is tensor else node.inputs[1], node, after=True)
    if node.op != "Where" or node.inputs[0] is tensor:
        return None
    how, fill = ("where", node.inputs[2]) if node.inputs[1] is tensor else ("unless", node.inputs[1])
    return MaskTerm(how, node.inputs[0], node, after=True) if sg.scalar(fill) == 0 else None


def _training(sg: SymbolicGraph, node: gs.Node) -> bool:
    """A Dropout that may drop something."""
    if node.op != "Dropout" or len(node.inputs) < 3 or not node.inputs[2].name:
        return False
    training = sg.array(node.inputs[2])
    return training is None or bool(training.any())


def _guard(sg: SymbolicGraph, tensor: gs.Tensor, held: list[gs.Tensor]) -> list[gs.Node]:
    """The nodes of `Where(c, x, p)`, or `Where(Not(c), p, x)`, the Where last, when no probability meets c: c is IsInf(p), perhaps and
    something else, or IsNaN(p) with x = 0 (what is left of a row without keys). Empty when there is none.

    Args:
        tensor: p.
        held: the tensors that hold the probabilities so far, p among them; c may ask any of them.
    """
    where = next((n for n in sg.readers(tensor) if n.op == "Where" and sum(t is tensor for t in n.inputs) == 1), None)
    if where is None or where.inputs[0] is tensor:
        return []
    other, when = (where.inputs[1], True) if where.inputs[2] is tensor else (where.inputs[2], False)
    test = _impossible(where.inputs[0], held, when)
    if test is None or (test.op == "IsNaN" and sg.scalar(other) != 0):
        return []
    nodes, stack = [where], [where.inputs[0]]
    while stack:
        node = producer(stack.pop())
        if node is not None and all(node is not n for n in nodes) and node.op in _OF_A_GUARD:
            nodes.append(node)
            stack += [t for t in node.inputs if all(t is not h for h in held)]
    return nodes[::-1]


_OF_A_GUARD = op_names("IsNaN IsInf And Or Not Cast Identity Greater Less Equal")


def _impossible(condition: gs.Tensor, held: list[gs.Tensor], when: bool) -> gs.Node | None:
    """The IsInf or IsNaN of the probabilities, without which a condition is not `when`."""
    node = producer(condition)
    if node is None or not is_standard(node):
        return None
    if node.op in ("IsNaN", "IsInf") and when:
        asked = node.inputs[0]
        while (wider := producer(asked)) is not None and wider.op == "Cast" and all(asked is not h for h in held):
            asked = wider.inputs[0]
        return node if any(asked is h for h in held) else None
    if node.op in ("Cast", "Identity", "Not", "And" if when else "Or"):
        turned = when != (node.op == "Not")
        return next((found for t in node.inputs if (found := _impossible(t, held, turned)) is not None), None)
    return None


def _refuse_other_readers(sg: SymbolicGraph, core: Core) -> None:
    """Nothing but the attention itself may read what will be gone."""
    inside = {id(n) for n in (core.scores, core.output, *core.between)}
    for node in (core.scores, *core.between):
        for tensor in node.outputs:
            if tensor.name in sg.outputs:
                raise Refusal(f"{tensor.name}, inside the attention, is an output of the graph (output_attentions).", label(node))
            other = next((n for n in sg.readers(tensor) if id(n) not in inside), None)
            if other is not None and other.op == "ReduceLogSumExp":
                raise Refusal(f"the sum of its exponentials is also used by itself, by {label(other)} (an attention sink).", label(other))
            if other is not None:
                raise Refusal(f"{tensor.name}, inside the attention, is also read by {label(other)}.", label(other))


def measure(sg: SymbolicGraph, core: Core) -> Axes:
    """The lengths of an attention and where its axes stand in the two products and at each mask.

    Raises:
        Refusal: batch and heads cannot be told, or rows and keys are not the last axes throughout.
    """
    axes = measured(sg, core.scores, core.output)
    for node in core.path:
        axes = replace(axes, places={**axes.places, id(node): carried(sg, node, axes)})
    return axes
