"""Objects in an S3 bucket: `store` is the storage, `client` sends and retries, `read` and `write` move bodies.

`errors` separates transient failures from those that the user must correct. Only `sharding.storage` imports it.
"""
