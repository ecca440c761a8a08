"""From an AOI's rasters to one finished sample.

`options` is what the user chooses, `scene` turns rasters into arrays (pure), `sample` puts both together with the
rasters' provenance. `run` imports it.
"""
