"""Where a model runs: targets, rewriting for them, checking, and making engines (TensorRT)."""
