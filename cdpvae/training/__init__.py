"""Training and evaluation of whole runs: DeepSpeed engine, loop, checkpoints, telemetry."""
