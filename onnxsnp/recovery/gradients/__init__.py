"""Gradients of an ONNX graph as an ONNX graph: one small rule per operator."""
