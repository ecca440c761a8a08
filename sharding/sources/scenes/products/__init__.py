"""Satellite products as delivered: Sentinel-2 SAFE and DIMAP; only `sharding.sources.scenes` imports it.

`read` tells a product by its name and returns its header, `sentinel2` and `dimap` read the facts of each kind from its
XML, which `metadata` parses within bounds. Pixels are read like those of any raster.
"""
