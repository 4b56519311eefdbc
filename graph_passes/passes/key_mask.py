"""Makes the bool [B, T] tensor that says which keys are real, from where the graph keeps it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.passes.names import Names
from graph_passes.site import AttentionSite, KeyMask

__all__ = ["KeyMaskBuilder"]

_COMPARISONS = {"==": "Equal", "!=": "Equal", "<=": "LessOrEqual", ">=": "GreaterOrEqual"}


class KeyMaskBuilder:
    """Builds each distinct key mask once and shares it between sites."""

    def __init__(self, graph: gs.Graph, tensors: dict[str, gs.Tensor], names: Names) -> None:
        self._opset = graph.opset
        self._tensors = tensors
        self._names = names
        self._made: dict[KeyMask, gs.Tensor] = {}

    def tensor(self, site: AttentionSite, mask: KeyMask, new: list[gs.Node]) -> gs.Tensor:
        """The key mask of a site; nodes that have to be made are appended to `new`."""
        if mask not in self._made:
            self._made[mask] = self._build(site, mask, new)
        return self._made[mask]

    def _build(self, site: AttentionSite, mask: KeyMask, new: list[gs.Node]) -> gs.Tensor:
        source = self._tensors[mask.tensor]

        def add(op: str, inputs: list[gs.Tensor], dtype: type = np.bool_, **attrs: object) -> gs.Tensor:
            name = self._names.new(f"key_mask/{mask.tensor}/{op}")
            out = gs.Variable(f"{name}_out", dtype=np.dtype(dtype))
            new.append(gs.Node(op, name, attrs, inputs, [out]))
            return out

        def constant(values: list[int], dtype: type = np.int64, scalar: bool = False) -> gs.Constant:
            array: np.ndarray = np.array(values[0] if scalar else values, dtype=dtype)
            return gs.Constant(self._names.new(f"key_mask/{mask.tensor}/constant"), array)

        out = source
        if mask.test in ("nonzero", "zero"):
            out = source if mask.boolean else add("Cast", [source], to=int(onnx.TensorProto.BOOL))
            out = add("Not", [out]) if mask.test == "zero" else out
        else:
            wide = add("Cast", [source], np.int64, to=int(onnx.TensorProto.INT64))
            out = add(_COMPARISONS[mask.test], [wide, constant([mask.bound], scalar=True)])
            out = add("Not", [out]) if mask.test == "!=" else out
        if mask.squeeze:
            out = add("Squeeze", [out, constant(list(mask.squeeze))])
        if mask.cut or mask.repeat:
            key = self._tensors[site.key.tensor]
            batch_axis, _, length_axis, _ = site.key.perm or (0, 1, 2, 3)
            shape = add("Shape", [key], np.int64)
            length = add("Gather", [shape, constant([length_axis])], np.int64, axis=0)
        if mask.cut:
            out = add("Slice", [out, constant([0]), length, constant([1])])
        if mask.repeat:
            batch = add("Gather", [shape, constant([batch_axis])], np.int64, axis=0)
            out = add("Expand", [out, add("Concat", [batch, length], np.int64, axis=0)])
        return out
