"""One run from end to end: a dataset becomes batches (`data`), weights (`training`) and metrics (`evaluation`).

It imports `models` and `sharding`, never Ray. `quality` holds the loss and the metrics; `reporting` writes the run's
logs and images.
"""
