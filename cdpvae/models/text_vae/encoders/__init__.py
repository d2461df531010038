"""From packed hidden states to what the latent reads, one way a file."""
