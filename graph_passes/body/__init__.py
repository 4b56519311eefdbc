"""Bodies of standard ONNX operators for `SampleAttention`, one for each variant, and their attachment to a model."""

from graph_passes.body.assembly import PROBE_OP_TYPE, PROBE_OUTPUTS, function, probe_function
from graph_passes.body.attach import attach

__all__ = ["PROBE_OP_TYPE", "PROBE_OUTPUTS", "attach", "function", "probe_function"]
