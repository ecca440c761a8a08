"""Real servers on this machine: `nodes` is a Ray cluster, `objectstore` an S3 server, `demo` the whole line.

`processes` starts and ends them for sure.
"""
