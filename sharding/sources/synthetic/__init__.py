"""Generated scenes: `terrain` paints land at 1.5 m, `rasters` images it by two instruments and writes GeoTIFFs.

Only the demo, tests and benchmarks import it.
"""
