"""Use of trained weights: whole scenes to images (`fusion`), GeoTIFFs (`predict`), weights that travel (`export`).

`windows` says how a scene is cut and blended, `fusion` computes it row by row. `predict` reads the scenes through
`sharding.prepare.inputs` and writes them by `sharding.rasters`; only it needs rasterio.
"""

from pipeline.prediction.fusion import Fusion

__all__ = ["Fusion"]
