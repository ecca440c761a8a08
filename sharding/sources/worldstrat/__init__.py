"""WorldStrat as it is published: zips read in place, or folders.

`files` finds and reads members of zips and folders, `layout` says which of them are an AOI's, `rasters` reads and
checks them. `run` and `prepare` import it.
"""
