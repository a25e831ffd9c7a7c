"""Recovering accuracy after a cut: the original distilled into the pruned model, in onnxruntime alone."""
