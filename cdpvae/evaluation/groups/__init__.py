"""The groups of figures of `cdpvae.evaluate`, one question a file."""
