"""Generated scenes: `terrain` paints land at 1.5 m, `rasters` lets two instruments see it and writes GeoTIFFs.

The demo, tests and benchmarks import it; nothing else of the product does.
"""
