"""The work of `shard`, `verify` and `inspect`, from a source to a published dataset.

`job` is what the user asks for. `dataset` plans (`splits`, `plan`), looks at what the output holds (`output`), has
shards built (`build`, by processes of `workers`) and writes the index last. `verify` and `inspection` read a dataset
back. Only command lines import it.
"""
