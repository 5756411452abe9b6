"""A cluster of one real node on this machine, without a Docker engine: it runs pods of the project's own images.

    python -m tests.cluster up       # idempotent; prints the variable for kubectl and for pytest
    python -m tests.cluster status
    python -m tests.cluster down     # nothing stays behind but caches

`machine` says what the machine lacks, `images` builds and imports, `node` knows the programs and their flags,
`supervisor` keeps them running, `leftovers` removes what they leave.
"""
