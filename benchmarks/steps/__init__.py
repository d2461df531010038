"""One optimizer step, three ways: ours, from stock parts, and the description to the letter."""
