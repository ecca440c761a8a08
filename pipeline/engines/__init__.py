"""Engines that train one network: `engine` is their protocol, `torch_engine` plain PyTorch, `deepspeed_engine` ZeRO.

`make` chooses between them by the configuration. An engine gets batches and gives images, takes losses back, updates
the weights, and gathers the state by parameter name; it knows no files, logs or schedules. `pipeline.training` imports
it.
"""
