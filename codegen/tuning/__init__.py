"""The autotuner: knob spaces, a database of measurements, workers that compile and measure, a search."""
