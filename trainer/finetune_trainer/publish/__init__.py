"""Publish: the gate, the model card, and exactly the evaluated bytes to the Hub or into a directory."""
