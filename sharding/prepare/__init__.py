"""Preparation: an AOI's rasters to one finished sample.

`options` holds the user's choices, `scene` turns rasters into arrays (pure), `sample` combines both with the rasters'
provenance. `run` imports it.
"""
