"""Inspection of a dataset: `describe` prints it and draws contact sheets.

The command line imports it; it reads what `format` stores, and needs no rasterio.
"""
