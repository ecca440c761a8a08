"""Real servers on this machine: `nodes` is a Ray cluster, `objectstore` an S3 server, `demo` runs all steps.

`processes` starts them and makes sure that they end.
"""
