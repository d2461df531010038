"""Exact and near-duplicates: MinHash signatures, banding, verified clusters."""
