"""A cluster as its users see it: FineTuneJobs, their logs, and every error as a sentence.

Read in this order: `problems` (errors as sentences), `jobs`, `job_watch`, `logs`.
"""
