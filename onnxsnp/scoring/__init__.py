"""What matters: scores of single neurons (lowest goes first), as pure numpy functions that know nothing of ONNX."""
