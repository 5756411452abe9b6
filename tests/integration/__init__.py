"""Tests against a real API server, controller manager and training-operator."""
