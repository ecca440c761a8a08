"""Deploy files: one short TOML file becomes files for KubeRay, Slurm, AWS, Docker and Apptainer.

Only `cluster.cli` imports it. `spec` reads and checks the TOML file, one module for each target turns it into the text
of files, `render` writes them, `crds` compares them with KubeRay's definitions.
"""
