"""A model without its weights: parameters are fake tensors, which have a shape and an element type and take no memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from sa_export.errors import UserError
from sa_export.hf.quiet import sentence_of

_LARGE = 2**26
"""Tensors of more elements than this are never allocated while a model is built, not even for the moment until they are replaced."""


def build_skeleton(config: Any, named: str, dtype: str, *, trust_remote_code: bool = False) -> Any:
    """The causal language model of a configuration, in evaluation mode, its parameters and persistent buffers fake.

    Buffers that a checkpoint does not hold (rotary frequencies, tables of positions) have their values: code computes them.

    Args:
        config: of transformers; it is not changed.
        named: how the user named the checkpoint, for the sentence.
        dtype: element type of the parameters.
        trust_remote_code: lets Python code of the checkpoint run.

    Raises:
        UserError: no model can be built from the configuration.
    """
    import torch
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    try:
        with no_init_weights(), _fake_parameters(mode):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
            model.tie_weights()
    except Exception as error:
        raise UserError(f"{named}: no model can be built from its config.json: {sentence_of(error)}") from error
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = _fake(buffer, mode)
    names = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_fake(tensor)]
    retype(model, {name: torch.float32 for name in names if _stays_in_float32(model, name, dtype)})
    return model.eval()


def _stays_in_float32(model: Any, name: str, dtype: str) -> bool:
    """Whether transformers loads a tensor in float32 although a half-precision model is asked for."""
    patterns = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype in ("float16", "bfloat16") else []
    if dtype == "float16":
        patterns += getattr(model, "_keep_in_fp32_modules", None) or ()
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)


def retype(model: Any, types: Mapping[str, Any]) -> None:
    """Gives parameters and buffers of a skeleton, by name, another element type; tied ones stay tied."""
    import torch

    memo: dict[int, Any] = {}
    for prefix, module in model.named_modules():
        for held, wrap in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in held.items():
                wanted = types.get(f"{prefix}.{name}" if prefix else name)
                if tensor is None or wanted is None or wanted == tensor.dtype or not is_fake(tensor):
                    continue
                if id(tensor) not in memo:
                    with tensor.fake_mode:
                        new = torch.empty(tensor.shape, dtype=wanted, device="cpu")
                    memo[id(tensor)] = torch.nn.Parameter(new, requires_grad=False) if wrap else new
                held[name] = memo[id(tensor)]


def is_fake(tensor: Any) -> bool:
    """Whether a tensor has no values."""
    from torch._subclasses import FakeTensor

    return isinstance(tensor, FakeTensor)


def fake_mode(model: Any) -> Any:
    """The context in which a skeleton runs; a context that does nothing for a model with weights."""
    parameter = next((p for p in model.parameters() if is_fake(p)), None)
    return nullcontext() if parameter is None else parameter.fake_mode


@contextmanager
def _fake_parameters(mode: Any) -> Iterator[None]:
    """Parameters that are registered while the block runs are fake."""
    import torch
    from torch.overrides import TorchFunctionMode

    before = torch.nn.Module.register_parameter

    def register(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None and not is_fake(parameter):  # a tied one stays the same object
            parameter = torch.nn.Parameter(_fake(parameter.data, mode), requires_grad=False)
        before(module, name, parameter)

    class NoLargeMemory(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.empty and _elements(args) > _LARGE:
                with mode:
                    return function(*args, **(kwargs or {}))
            return function(*args, **(kwargs or {}))

    torch.nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        with NoLargeMemory():
            yield
    finally:
        torch.nn.Module.register_parameter = before  # type: ignore[method-assign]


def _elements(args: Any) -> int:
    """Elements of the tensor that `torch.empty(*args)` makes."""
    sizes = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    count = 1
    for size in sizes:
        count *= int(size)
    return count


def _fake(tensor: Any, mode: Any) -> Any:
    import torch

    if is_fake(tensor):
        return tensor
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
