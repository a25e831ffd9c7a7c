"""The cut: weights, shape constants and attributes rewritten for the neurons that stay."""
