"""One training run: `loop` takes steps on batches of `pipeline.data` until the run is complete.

`engines` chooses the engine that computes a step (`deepspeed_engine` or `torch_engine`, by the protocol in `engine`),
`step_values` brings losses and norms of all ranks to the host, `schedule` gives the learning rate, `checkpoint` writes
and reads checkpoints, `resume` decides where a run begins. `cluster` and the command line import `loop`.
"""
