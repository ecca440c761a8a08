"""From WorldStrat rasters to WebDataset shards with an index, on disk or S3."""
