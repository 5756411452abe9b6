"""The only Kubernetes calls: observe and act."""
