"""Sources of scenes, one folder per kind of source.

`run` and `prepare` read them. `worldstrat` reads the published archives and folders; `synthetic` writes generated
scenes in WorldStrat's layout, for the demo and the tests.
"""
