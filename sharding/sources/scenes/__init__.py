"""Source of a user's own GeoTIFFs, described by ``scenes.toml`` beside them.

`description` parses that file, `layout` finds the files of each scene, `bands` names bands, `raster` opens files and
reads them onto a grid (`grid`), `source` cuts scenes into tiles and reads a tile. Rasters meet by their georeferences.
"""
