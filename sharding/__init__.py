"""Dataset making: rasters to published shards. Also the base of the other packages: storage, errors, progress.

It imports nothing of ours. Data passes `sources` -> `prepare` -> `format`, driven by `run`; `pipeline` and `cluster`
import `storage`, `format`, `errors` and `progress`; the command line imports everything. `arguments` turns the fields
of a dataclass into options of the command line.
"""
