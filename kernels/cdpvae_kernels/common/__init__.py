"""What the operations share: checks, dispatch, products, launch configurations."""
