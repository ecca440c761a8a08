"""From rasters to published shards, and the ground that the other packages stand on: storage, errors, progress.

It imports nothing of ours. Data passes `sources` -> `prepare` -> `format`, driven by `run`; `pipeline` and `cluster`
import `storage`, `format`, `errors` and `progress`, the command line everything. `arguments` makes a dataclass's fields
options of the command line.
"""
