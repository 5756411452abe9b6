"""The trainer: prepare, train, evaluate and publish, each a stage with a report of its own."""
