"""Texts to vectors with onnxruntime."""
