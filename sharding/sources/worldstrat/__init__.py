"""WorldStrat source: the published zips, read in place, or folders.

`files` finds and reads members of zips and folders, `layout` assigns them to AOIs, `rasters` reads and checks the
rasters. `run` and `prepare` import it.
"""
