"""Records read, converted and batched while training, without preprocessing."""
