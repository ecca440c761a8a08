"""Output of a run, and the way to watch it.

`run_logs` writes a rank's values through `events` (TensorBoard, CSV) and `panels` into the `run_folder`, which is
synchronised to S3; `monitor` serves TensorBoard on run folders. Training and evaluation import it.
"""
