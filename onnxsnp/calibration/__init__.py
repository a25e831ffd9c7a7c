"""What flows through a model: calibration data, its preprocessing, and the statistics gathered from it."""
