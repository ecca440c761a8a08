"""One run from end to end: a dataset becomes batches (`data`), weights (`training`) and figures (`evaluation`).

It imports `models` and `sharding`, never Ray. `quality` is the loss and the metrics, `reporting` what a run writes.
"""
