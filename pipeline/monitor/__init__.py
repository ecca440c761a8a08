"""Many runs in one TensorBoard.

`discover` finds runs below folders and prefixes, `feed` reads the new bytes of their events, `board` writes what
TensorBoard shows (`pages` its texts, hyperparameters and layout, `seeds` the means over runs), and `serve` keeps it up
to date. `export` writes all scalars to one file. The command line imports it; `records` is TensorBoard's file format.
"""
