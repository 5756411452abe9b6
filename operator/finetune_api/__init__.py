"""The resource FineTuneJob as data: spec, status, run config and report, and the schema made from them."""

INSTALL = "pip install 'finetune-operator[{extra}] @ git+https://git.example.com/ml/finetune-operator.git'"
"""How the package is installed with an extra. The address stands for that of the repository, as in docs/install.md; a
bare name would install what anybody has registered under it on a package index."""
