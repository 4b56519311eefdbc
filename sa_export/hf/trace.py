"""The torch model as an ONNX graph: traced by `torch.onnx` (dynamo) without its weights, its names and dimensions put in order."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from sa_export.errors import UserError
from sa_export.hf import interface
from sa_export.hf.quiet import sentence_of
from sa_export.hf.skeleton import is_fake
from sa_export.hf.step import BATCH, PAST, SEQUENCE, TOTAL, CacheLayer, TensorSpec, step_module

ATTENTIONS = ("sdpa", "eager", "sample")
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"

_KEPT_METADATA = ("pkg.torch.onnx.name_scopes",)
"""Of the exporter's notes on nodes only the module path stays; stack traces would carry the paths of this machine into the file."""
_INLINE_BYTES = 2**20
"""Constants that code computes stay inside the model up to this size."""
_ALIGNMENT = 4096
_EXAMPLE_BATCH, _EXAMPLE_TOKENS, _EXAMPLE_PAST = 2, 5, 3
"""Sizes of the example that is traced: all different, none 0 or 1, since torch.export takes those for constants."""


@contextmanager
def attention_implementation(model: Any, name: str) -> Iterator[str]:
    """The model with another attention implementation, until the block ends; yields the one that it really runs.

    Args:
        name: "sdpa", "eager" or "sample" (`interface`).

    A model class without `sdpa` runs "eager", the same function of the same tensors. A class that takes no implementation from outside
    keeps its own.

    Raises:
        UserError: "sample" was asked for and the class does not take an implementation from outside.
    """
    if name == "sample":
        interface.register()
    wanted = interface.NAME if name == "sample" else name
    before = model.config._attn_implementation
    try:
        try:
            model.set_attn_implementation(wanted)
        except (ValueError, ImportError):  # transformers' way to say that the class has no sdpa
            wanted = "eager"
            model.set_attn_implementation(wanted)
        runs = model.config._attn_implementation
        if name == "sample" and runs != interface.NAME:
            raise UserError(
                f"{type(model).__name__} does not take its attention from transformers' AttentionInterface; "
                f"export it with attention 'sdpa' or 'eager' and rewrite the graph."
            )
        yield "sample" if runs == interface.NAME else runs
    finally:
        model.set_attn_implementation(before)


@contextmanager
def traceable_experts(model: Any) -> Iterator[bool]:
    """Mixture-of-experts layers in a form that can be traced, until the block ends; yields whether the model has such layers.

    The usual forms loop over the experts that were hit, or call an operator that ONNX does not have; this one gathers the weights of each
    token's experts and multiplies in a batch.
    """
    if not getattr(model, "_can_set_experts_implementation", lambda: False)():
        yield False
        return
    before = model.config._experts_implementation
    model.set_experts_implementation("batched_mm")
    try:
        yield True
    finally:
        model.set_experts_implementation(before)


def trace(
    model: Any, layers: tuple[CacheLayer, ...], inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], *, opset: int, logits: str
) -> Any:
    """The model as an `onnx_ir.Model`. A weight of a skeleton has a name, a type and a shape, and no value yet (`to_proto`).

    Args:
        model: on the CPU, in evaluation mode, its attention implementation chosen; from `build_skeleton`.
        layers: of its cache.
        inputs, outputs: names and shapes of the graph's inputs and outputs, in order.
        opset: version of the standard operators, 18 to 24.
        logits: "all", or "last" (`step.last_attended`).

    Raises:
        UserError: torch cannot trace or translate the model.
    """
    import torch

    total = _EXAMPLE_PAST + _EXAMPLE_TOKENS
    positions = torch.arange(_EXAMPLE_PAST, total)
    cached = [
        tuple(torch.zeros(_EXAMPLE_BATCH, c.heads, _EXAMPLE_PAST, size, dtype=model.dtype) for size in (c.key_size, c.value_size))
        for c in layers
    ]
    example = (
        torch.zeros(_EXAMPLE_BATCH, _EXAMPLE_TOKENS, dtype=torch.int64),
        torch.ones(_EXAMPLE_BATCH, total, dtype=torch.int64),
        positions.repeat(_EXAMPLE_BATCH, 1),
        cached,
    )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    try:
        # On failure torch prints the graph so far, past its loggers.
        with torch.no_grad(), step_module(model, logits) as step, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):

            def exported(most: int | None) -> Any:
                return torch.onnx.export(
                    step,
                    example,
                    dynamo=True,
                    opset_version=opset,
                    dynamic_shapes=_dynamic_shapes(len(layers), most),
                    input_names=[spec.name for spec in inputs],
                    output_names=[spec.name for spec in outputs],
                    verbose=False,
                    optimize=False,
                )

            try:
                program = exported(None)
            except Exception as error:
                # A table as long as the model's context, cut to the call, is wrong for longer ones: torch wants that said.
                if longest is None or "Constraints violated" not in _root_cause(error):
                    raise
                program = exported(longest)
            assert program is not None  # dynamo=True always gives a program
            weights = _without_values(program.model)
            with _quick_matching():
                program.optimize()
    except UserError:
        raise
    except Exception as error:
        hint = " Attention 'sdpa' may be exported." if model.config._attn_implementation == interface.NAME else ""
        raise UserError(f"torch.onnx cannot export {type(model).__name__} at opset {opset}: {_root_cause(error)}{hint}") from error
    graph_model = program.model
    for name, value in graph_model.graph.initializers.items():
        if name in weights:
            value.const_value = weights[name]
    _name_dimensions(graph_model, inputs, outputs)
    _drop_metadata(graph_model)
    _name_weights(graph_model)
    return graph_model


def _dynamic_shapes(layers: int, most: int | None) -> tuple[Any, ...]:
    """Which axes of the inputs are free, and how long they may be at most; torch.export knows no sum of two free lengths, so the mask's
    is free by itself here and gets its name in `_name_dimensions`."""
    from torch.export import Dim

    batch, sequence, past = Dim(BATCH), Dim(SEQUENCE, max=most), Dim(PAST, max=most)
    tokens = {0: batch, 1: sequence}
    return (tokens, {0: batch, 1: Dim.DYNAMIC}, tokens, [({0: batch, 2: past},) * 2] * layers)


@contextmanager
def _quick_matching() -> Iterator[None]:
    """onnxscript's optimizer without a cost that grows with the square of the graph, until the block ends; its results are the same.

    It tries every node of the graph as the first output of a pattern that has several (0.7.2: two slices that make a split), and looks
    through all nodes each time. Here a node of another operator than the pattern's is passed over at once.
    """
    try:
        from onnxscript.rewriter._basics import MatchResult
        from onnxscript.rewriter._matcher import SimplePatternMatcher
    except ImportError:  # another version of onnxscript: slower for deep models, that is all
        yield
        return
    before = SimplePatternMatcher.match

    def match(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        outputs = self.pattern.output_nodes
        wanted = outputs[0].op_identifier() if len(outputs) > 1 else None
        if wanted is not None and wanted != node.op_identifier():
            return MatchResult().fail("Another operator.")
        return before(self, model, graph, node, **options)

    SimplePatternMatcher.match = match
    try:
        yield
    finally:
        SimplePatternMatcher.match = before


def _without_values(graph_model: Any) -> dict[str, Any]:
    """Takes the tensors of weights away from a graph that is to be optimized, and returns them by name.

    The optimizer folds small tensors into new constants (a cast of a norm's scale), which no file of the checkpoint holds.
    """
    weights = {}
    for name, value in graph_model.graph.initializers.items():
        if is_fake(getattr(value.const_value, "raw", None)):
            weights[name] = value.const_value
            value.const_value = None
    return weights


def to_proto(graph_model: Any, *, inline: bool = False) -> tuple[Any, dict[str, Any]]:
    """The traced graph as a pending `onnx.ModelProto`, its SampleAttention nodes with their function bodies, and its large constants.

    Each weight, and each constant of more than a mebibyte, is an external tensor of `DATA_FILE`, one behind the other; that file does
    not exist, and the metadata of the model say so (`external_data.PENDING`).

    Args:
        inline: keeps large constants inside the model.

    Returns:
        The model, and the values (torch) of the large constants by name.
    """
    import onnx_ir

    from graph_passes import external_data
    from graph_passes.body import attach

    constants: dict[str, Any] = {}
    at = 0
    for name, value in graph_model.graph.initializers.items():
        tensor = value.const_value
        if not is_fake(getattr(tensor, "raw", None)):
            if inline or tensor.nbytes <= _INLINE_BYTES:
                continue
            constants[name] = _as_torch(tensor)
        value.const_value = onnx_ir.ExternalTensor(DATA_FILE, at, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir="")
        at = -(-(at + tensor.nbytes) // _ALIGNMENT) * _ALIGNMENT
    proto = onnx_ir.to_proto(graph_model)
    attach(proto)
    entry = proto.metadata_props.add()
    entry.key, entry.value = external_data.PENDING, "1"
    return proto, constants


def sample_attention_nodes(model: Any) -> int:
    """How many SampleAttention nodes the main graph of an `onnx.ModelProto` has."""
    from graph_passes import op

    return sum(node.domain == op.DOMAIN and node.op_type == op.OP_TYPE for node in model.graph.node)


def _as_torch(tensor: Any) -> Any:
    import torch

    raw = getattr(tensor, "raw", None)
    return raw.detach() if isinstance(raw, torch.Tensor) else torch.from_numpy(tensor.numpy().copy())


def _name_dimensions(graph_model: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    import onnx_ir

    graph = graph_model.graph
    symbol = str(graph.inputs[1].shape[1].value)
    word = re.compile(rf"\b{re.escape(symbol)}\b")
    values = {id(v): v for node in graph_model.graph.all_nodes() for v in (*node.inputs, *node.outputs) if v is not None}
    for value in values.values():
        for i, dimension in enumerate(value.shape or ()):
            name = getattr(dimension, "value", None)
            if name is not None and word.search(name):
                value.shape[i] = onnx_ir.SymbolicDim(TOTAL if name == symbol else word.sub(f"({TOTAL})", name))
    for value, spec in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        for traced, meant in zip(value.shape, spec.shape, strict=True):
            if isinstance(traced, int) and traced != meant:
                raise UserError(f"The model's code fixes a dimension of {spec.name} to {traced} while it is traced; it cannot be exported.")
        value.shape = onnx_ir.Shape(spec.shape)


def _name_weights(graph_model: Any) -> None:
    """Gives the weights that kept their names those of the checkpoint: the traced module holds the model as its member `model`."""
    for value in list(graph_model.graph.initializers.values()):
        value.name = value.name.removeprefix("model.")


def _drop_metadata(graph_model: Any) -> None:
    for node in graph_model.graph.all_nodes():
        kept = {key: node.metadata_props[key] for key in _KEPT_METADATA if key in node.metadata_props}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for holder in (graph_model, graph_model.graph, *graph_model.graph.inputs, *graph_model.graph.initializers.values()):
        holder.metadata_props.clear()


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return sentence_of(error)
