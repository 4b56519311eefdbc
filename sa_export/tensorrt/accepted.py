"""What NVIDIA's ONNX parser accepts, written down so that a model can be judged without TensorRT.

Observed with TensorRT for RTX 1.7.1.116, which is of TensorRT's 11.x generation; a test repeats the observation.
"""

from __future__ import annotations

__all__ = ["CONTRIB_OPERATORS", "CONTRIB_PLUGINS", "ELEMENT_TYPES", "NO_IMPORTER", "OBSERVED_WITH", "RTX_PLUGINS", "TRT_OPERATORS"]

OBSERVED_WITH = "tensorrt_rtx 1.7.1.116"

NO_IMPORTER = frozenset(
    [
        "AffineGrid",
        "Bernoulli",
        "BitCast",
        "BitShift",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "BitwiseXor",
        "CenterCropPad",
        "Col2Im",
        "Compress",
        "ConcatFromSequence",
        "ConvInteger",
        "CumProd",
        "DFT",
        "DeformConv",
        "Det",
        "DynamicQuantizeLinear",
        "ImageDecoder",
        "MatMulInteger",
        "MaxRoiPool",
        "MaxUnpool",
        "MelWeightMatrix",
        "Multinomial",
        "NegativeLogLikelihoodLoss",
        "Optional",
        "OptionalGetElement",
        "OptionalHasElement",
        "QLinearConv",
        "QLinearMatMul",
        "RegexFullMatch",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
        "SequenceLength",
        "SequenceMap",
        "SoftmaxCrossEntropyLoss",
        "SplitToSequence",
        "StringConcat",
        "StringNormalizer",
        "StringSplit",
        "SwiGLU",
        "TfIdfVectorizer",
        "Unique",
    ]
)
"""Operators of the ONNX standard (up to opset 27) that the parser has no importer for."""

CONTRIB_OPERATORS = frozenset(
    {"Gelu", "MultiHeadAttention", "RotaryEmbedding", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"}
)
"""Operators of domain com.microsoft that TensorRT for RTX takes; TensorRT is not known to."""

CONTRIB_PLUGINS = frozenset({"CausalConvWithState", "GroupQueryAttention", "LinearAttention", "MatMulNBits", "QMoE"})
"""Operators of domain com.microsoft that TensorRT for RTX knows, but leaves to plugins that it does not bring."""

RTX_PLUGINS = frozenset({"NonZero"})
"""Standard operators that TensorRT takes, and TensorRT for RTX leaves to plugins that it does not bring."""

TRT_OPERATORS = frozenset({"TRT_Attention", "TRT_KVCacheUpdate", "TRT_MoE"})

ELEMENT_TYPES = frozenset(
    {"BFLOAT16", "BOOL", "DOUBLE", "FLOAT", "FLOAT16", "FLOAT4E2M1", "FLOAT8E4M3FN", "INT32", "INT4", "INT64", "INT8", "UINT8"}
)
"""ONNX element types of tensors that the parser takes. It computes DOUBLE in float32."""
