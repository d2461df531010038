"""Measure where time and memory go."""

from cdpvae.profiling.throughput import ThroughputMeter, peak_flops, training_flops

__all__ = ["ThroughputMeter", "peak_flops", "training_flops"]
