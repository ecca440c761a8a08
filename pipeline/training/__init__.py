"""One training run: `loop` takes steps on batches of `pipeline.data` until the run is complete.

An engine of `pipeline.engines` computes a step, `step_values` brings losses and norms of all ranks to the host,
`schedule` gives the learning rate, `validation` scores the weights, `average` averages them, `checkpoint` writes and
reads checkpoints; `resume` and `initial` decide where a run begins. `cluster` and the command line import `loop`.
"""
