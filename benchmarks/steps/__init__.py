"""The variants of one optimizer step: cdpvae's, from stock parts, and the literal description."""
