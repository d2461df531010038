"""Exact and near-duplicates: MinHash signatures, locality-sensitive hashing, clusters."""
