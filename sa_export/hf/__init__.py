"""Hugging Face checkpoints: load one, export it to ONNX, prove the export against the torch model."""
