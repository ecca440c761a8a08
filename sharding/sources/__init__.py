"""Where scenes come from: one folder for each kind of source.

`run` and `prepare` read them. `worldstrat` reads the published archives and folders; `synthetic` writes generated
scenes in WorldStrat's form, for the demo and the tests.
"""
