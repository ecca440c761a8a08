"""Rasters for users: `cog` writes a scene as a Cloud-optimised GeoTIFF, row by row, and draws its preview.

`pipeline.prediction` imports it. It needs rasterio.
"""
