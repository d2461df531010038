"""Training of the text VAE: set-up, loading, schedule, step log."""
