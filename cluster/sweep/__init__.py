"""Sweeps: one training for each encoder, head and seed, and one table.

`plan` makes the configurations of the runs from `options`, `cell` trains and evaluates one of them, `here` and `on_ray`
start the cells on this machine and on a cluster, `run` keeps what is done, and `table` writes it. `job` is the driver
on a cluster.
"""
