"""Makes the standard nodes that a fused operator stands for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.passes.names import Names
from graph_passes.site import Refusal, label
from graph_passes.symbolic import shapes
from graph_passes.symbolic.graph import CORE_DOMAIN, Shape, SymbolicGraph
from graph_passes.symbolic.poly import Poly

__all__ = ["Maker"]

_REAL = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT)


class Maker:
    """Collects the nodes that replace one node, in order, with their shapes.

    Args:
        node: the fused operator; new nodes are named after it.
        inputs, outputs: what it reads and makes.
    """

    def __init__(self, sg: SymbolicGraph, node: gs.Node, inputs: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor], names: Names) -> None:
        self.sg = sg
        self.node = node
        self.outputs = tuple(outputs)
        self.made: list[gs.Node] = []
        self.absorbed: list[gs.Node] = []
        """Nodes in front that nothing else reads, and that go with the operator."""
        self._inputs = tuple(inputs)
        self._names = names
        self._shared: list[Hashable] = []
        self._label = label(node)

    def inputs(self, count: int) -> list[gs.Tensor | None]:
        """The first `count` inputs, None for one that is left out."""
        present = [t if t.name else None for t in self._inputs]
        if len(present) > count:
            raise self.refusal(f"it has {len(present)} inputs; {count} are known to this program.")
        return present + [None] * (count - len(present))

    def needed(self, *tensors: gs.Tensor | None) -> list[gs.Tensor]:
        """The tensors, none of which may be left out."""
        if any(t is None for t in tensors):
            raise self.refusal("it lacks an input that its operator needs.")
        return [t for t in tensors if t is not None]

    def dtype(self, tensor: gs.Tensor) -> int | None:
        return self.sg.dtype(tensor)

    def is_read(self, output: int) -> bool:
        """Whether something reads an output of the node."""
        if output >= len(self.outputs) or not self.outputs[output].name:
            return False
        return bool(self.outputs[output].outputs) or self.outputs[output].name in self.sg.outputs

    def output(self, k: int) -> gs.Tensor | None:
        """An output of the node, or None when it is left out."""
        return self.outputs[k] if k < len(self.outputs) and self.outputs[k].name else None

    def refusal(self, reason: str) -> Refusal:
        return Refusal(reason, self._label)

    def refuse_unknown_attributes(self, known: frozenset[str]) -> None:
        unknown = sorted(set(self.node.attrs) - known)
        if unknown:
            raise self.refusal(f"its attribute {unknown[0]} is not known to this program.")

    def shape(self, tensor: gs.Tensor, rank: int | None = None) -> Shape:
        found = self.sg.known_shape(tensor, self.node)
        if rank is not None and len(found) != rank:
            raise self.refusal(f"its input {tensor.name} has {len(found)} axes; {rank} are needed.")
        return found

    def same_lengths(self, bias: gs.Tensor, query: gs.Tensor, key: gs.Tensor) -> gs.Tensor:
        """A bias of the scores, whose last two lengths the operator requires to be those of rows and keys."""
        self.shape(bias, 4)
        self.sg.same_axes += [(bias, 2, query, 2), (bias, 3, key, 2)]
        return bias

    def number(self, length: Poly, what: str) -> int:
        if length.value is None:
            raise self.refusal(f"its {what} is not fixed in the graph.")
        return length.value

    def attribute(self, name: str, default: int) -> int:
        return int(self.node.attrs.get(name, default))

    def flag(self, name: str) -> bool:
        """An attribute that is 0 (also when it is absent) or 1; of other values runtimes make what they like."""
        value = self.attribute(name, 0)
        if value not in (0, 1):
            raise self.refusal(f"its attribute {name} is {value}; 0 or 1 is needed.")
        return value == 1

    def op(
        self,
        op_type: str,
        *inputs: gs.Tensor,
        into: gs.Tensor | None = None,
        shape: Shape | None = None,
        outputs: int = 1,
        domain: str | None = None,
        **attrs: object,
    ) -> gs.Tensor:
        """The (first) result of a new node.

        Args:
            into: the tensor to make; a new one without it.
            shape: lengths that the definition of the fused operator guarantees where inference cannot know them.
        """
        name = self._names.new(f"{self.node.name or self.node.op}/{op_type}")
        results = [into or gs.Variable(f"{name}_out")] + [gs.Variable(f"{name}_out_{k}") for k in range(1, outputs)]
        node = gs.Node(op_type, name, attrs, list(inputs), results, domain=domain)
        node.stands_for = self._label
        self.made.append(node)
        self.sg.tensors.update({t.name: t for t in (*inputs, *results)})
        if shape is not None:
            self.sg.stated[results[0].name] = shape
        shapes.infer(self.sg, node)
        return results[0]

    def shared(self, what: tuple[Hashable, ...], make: Callable[[], gs.Tensor]) -> gs.Tensor:
        """What `make` gives, made once for all operators of the graph that ask for the same."""
        key = ("shared", what)
        if key not in self.sg.memory:
            self.sg.memory[key] = make()
            self._shared.append(key)
        return self.sg.memory[key]

    def give_up(self) -> None:
        """Takes everything back that was made."""
        for key in self._shared:
            del self.sg.memory[key]
        for node in self.made:
            node.inputs.clear()
            node.outputs.clear()

    def results(self) -> list[gs.Tensor]:
        """All results of the newest node."""
        return list(self.made[-1].outputs)

    def ints(self, values: Sequence[int] | int, dtype: type = np.int64) -> gs.Constant:
        return self._constant(np.array(values, dtype=dtype))

    def real(self, value: float, like: gs.Tensor) -> gs.Constant:
        """A number of the element type of a tensor."""
        dtype = self.sg.dtype(like)
        if dtype not in _REAL:
            raise self.refusal(f"the element type of {like.name} is not known to be float16, bfloat16 or float.")
        return self._constant(np.array(value, dtype=onnx.helper.tensor_dtype_to_np_dtype(dtype)))

    def floats(self, value: float) -> gs.Constant:
        return self._constant(np.array(value, dtype=np.float32))

    def _constant(self, array: np.ndarray) -> gs.Constant:
        return gs.Constant(self._names.new(f"{self.node.name or self.node.op}/constant"), array)

    def length(self, tensor: gs.Tensor, axis: int) -> gs.Tensor:
        """A length as a tensor of one element."""
        value = self.shape(tensor)[axis].value
        return self.ints([value]) if value is not None else self.op("Shape", tensor, start=axis, end=axis + 1)

    def cast(self, tensor: gs.Tensor, dtype: int) -> gs.Tensor:
        return tensor if self.sg.dtype(tensor) == dtype else self.op("Cast", tensor, to=dtype)

    def positions(self, count: gs.Tensor) -> gs.Tensor:
        """0, 1, ... up to a count that is a tensor of one element."""
        return self.op("Range", self.ints(0), self.op("Squeeze", count, self.ints([0])), self.ints(1))

    def heads_first(self, tensor: gs.Tensor, heads: int) -> gs.Tensor:
        """[B, length, heads * size] as [B, heads, length, size]."""
        width = self.number(self.shape(tensor, 3)[2], "width")
        if heads < 1 or width % heads:
            raise self.refusal(f"its {heads} heads do not divide the width {width} of {tensor.name}.")
        split = self.op("Reshape", tensor, self.ints([0, 0, heads, width // heads]))
        return self.op("Transpose", split, perm=[0, 2, 1, 3])

    def rows_first(self, tensor: gs.Tensor, into: gs.Tensor | None) -> gs.Tensor:
        """[B, heads, length, size] as [B, length, heads * size]."""
        _, heads, _, size = self.shape(tensor, 4)
        width = self.number(heads * size, "width")
        return self.op("Reshape", self.op("Transpose", tensor, perm=[0, 2, 1, 3]), self.ints([0, 0, width]), into=into)

    def core(
        self,
        query: gs.Tensor,
        key: gs.Tensor,
        value: gs.Tensor,
        masks: Sequence[gs.Tensor],
        *,
        pattern: str,
        scale: float,
        softcap: float = 0.0,
        offset: Poly | None = None,
        into: gs.Tensor | None = None,
    ) -> gs.Tensor:
        """The attention itself, [B, Hq, S, Dv]; see `CORE_DOMAIN` in `symbolic.graph`."""
        q, v = self.shape(query, 4), self.shape(value, 4)
        name = self.node.name
        result = into or gs.Variable(self._names.new(f"{name or self.node.op}/heads"))
        attrs = {"scale": scale, "softcap": softcap, "offset": offset, "pattern": pattern}
        node = gs.Node(self.node.op, name, attrs, [query, key, value, *masks], [result], domain=CORE_DOMAIN)
        node.stands_for = self._label
        self.made.append(node)
        self.sg.tensors.update({t.name: t for t in (*node.inputs, result)})
        self.sg.stated[result.name] = (*q[:3], v[3])
        shapes.infer(self.sg, node)
        return result
