"""From raw records to processed Arrow data: `pipeline.preprocess` runs all stages."""
