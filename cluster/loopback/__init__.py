"""Library that keeps every server of a local cluster on loopback: `bind.c`, compiled and preloaded by `library`."""
