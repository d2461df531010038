"""From raw records to processed Arrow data: `pipeline.preprocess` runs it all."""
