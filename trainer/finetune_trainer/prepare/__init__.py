"""Prepare: model and datasets fetched, checked, split, rendered and tokenised, before a GPU is taken."""
