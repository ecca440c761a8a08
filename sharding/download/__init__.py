"""WorldStrat's published files over HTTP: `worldstrat` names and checks them, `fetch` downloads one file.

It uses `sharding.storage` and serves only the verb `download`. Bytes go to ``<name>.part``; the part gets the final
name when its SHA-256 is the published one. ``<name>.verified`` then saves reading the file again.
"""
