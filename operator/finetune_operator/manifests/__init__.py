"""Spec → Kubernetes objects: pure functions, one module a kind of child. Nothing is created here."""
