"""The contract between the side that writes a dataset and the side that reads it.

`index` says what a dataset is and where each sample lies, `sample` decodes and checks a sample's bytes, `writer` packs
samples into a shard, `statistics` counts band values. `pipeline` imports `index` and `sample`, which need neither
rasterio nor torch.
"""
