"""A Kubernetes control plane on loopback, without nodes, for the integration tests.

Read in this order: `binaries` (where the programs come from), `certificates`, `processes`,
`api` (the one place that talks HTTP), `programs` (flags and files), `control_plane` (starts it
all), `fake_kubelet` (what nodes would have done), `manifests` (small objects for tests).
"""
