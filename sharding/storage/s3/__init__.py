"""Objects in an S3 bucket: `store` is the storage, `client` sends and retries, `read` and `write` move bodies.

`errors` tells failures that pass from those the user must repair. Only `sharding.storage` imports it.
"""
