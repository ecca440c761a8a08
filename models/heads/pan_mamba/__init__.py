"""Pan-Mamba: `head` is the network, `blocks` its Mamba and cross-Mamba blocks, `scan` the selective scan."""
