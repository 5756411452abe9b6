"""A cluster as a person with a kubeconfig sees it: FineTuneJobs, their logs, and every error as a sentence.

Read in this order: `connection` (kubeconfig, requests), `problems` (errors as sentences), `jobs`, `following`, `logs`.
"""
