"""Measures speed: `medusa-export bench` and `medusa-export tune`."""
