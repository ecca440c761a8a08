"""Output of a run.

`run_logs` writes a rank's values through `events` (TensorBoard, CSV) and `panels` into the `run_folder`, which is
synchronised to S3; `tags` names every value. Training, evaluation and the monitor import it.
"""
