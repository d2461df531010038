"""What a trained checkpoint is worth: likelihoods, reconstruction, latents, verdicts."""
