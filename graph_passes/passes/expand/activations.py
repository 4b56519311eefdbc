"""Activations of ONNX Runtime (`com.microsoft`) in standard operators: `Gelu`, `BiasGelu`, `FastGelu`, `QuickGelu`.

Source: Hendrycks and Gimpel, GELU (arXiv 1606.08415): by the error function, by tanh, and by the logistic function.
"""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from graph_passes.passes.expand.maker import Maker
from graph_passes.symbolic.graph import op_names

__all__ = ["expand_fast_gelu", "expand_gelu", "expand_quick_gelu"]


def expand_gelu(m: Maker) -> None:
    """x / 2 * (1 + erf(x / sqrt 2)), x with a bias added when there is one."""
    x = _with_bias(m)
    inner = m.op("Erf", m.op("Mul", x, m.real(math.sqrt(0.5), x)))
    _half_of(m, x, inner)


def expand_fast_gelu(m: Maker) -> None:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    x = _with_bias(m)
    cube = m.op("Mul", m.op("Mul", x, x), x)
    inner = m.op("Add", x, m.op("Mul", cube, m.real(0.044715, x)))
    _half_of(m, x, m.op("Tanh", m.op("Mul", inner, m.real(math.sqrt(2.0 / math.pi), x))))


def expand_quick_gelu(m: Maker) -> None:
    """x * sigmoid(alpha x)."""
    (x,) = m.needed(*m.inputs(1))
    m.refuse_unknown_attributes(op_names("alpha"))
    alpha = float(m.node.attrs.get("alpha", 1.702))
    inner = x if alpha == 1 else m.op("Mul", x, m.real(alpha, x))
    m.op("Mul", x, m.op("Sigmoid", inner), into=m.output(0))


def _with_bias(m: Maker) -> gs.Tensor:
    x, bias = m.inputs(2)
    (x,) = m.needed(x)
    m.refuse_unknown_attributes(frozenset())
    return x if bias is None else m.op("Add", x, bias)


def _half_of(m: Maker, x: gs.Tensor, inner: gs.Tensor) -> None:
    m.op("Mul", m.op("Mul", x, m.real(0.5, x)), m.op("Add", inner, m.real(1.0, x)), into=m.output(0))
