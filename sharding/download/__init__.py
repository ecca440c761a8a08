"""WorldStrat's published files over HTTP: `worldstrat` names and checks them, `fetch` brings one file.

It stands on `sharding.storage` and serves the verb `download` alone. Bytes go to ``<name>.part`` and get the final name
when their SHA-256 is the published one; ``<name>.verified`` then saves reading the file again.
"""
