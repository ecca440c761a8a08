"""Runs of `shard`, `verify` and `inspect`, from a source to a published dataset.

`job` holds the options. `dataset` plans (`splits`, `plan`), inspects the output (`output`), builds shards (`build`, in
processes of `workers`) and writes the index last. `verify` and `inspection` read a dataset. Only command lines import
this package.
"""
