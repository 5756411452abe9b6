"""Spec → Kubernetes objects: pure functions, one module per kind of child. Nothing is created here."""
