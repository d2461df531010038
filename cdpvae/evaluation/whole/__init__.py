"""The run of `cdpvae.evaluate`: options, rows, groups one after another, seeds."""
