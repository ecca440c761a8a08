"""Dataset format: the contract between the writer of a dataset and its readers.

`index` defines the index and each sample's byte range, `sample` checks and decodes a sample's bytes, `writer` packs
samples into a shard, `statistics` counts band values. `pipeline` imports `index` and `sample`, which need neither
rasterio nor torch.
"""
