"""Codes of a corpus: any number of texts to a Parquet file of codes, and back to texts."""
