"""The operator: decides what a FineTuneJob needs next and carries it out, on a cluster or on this machine."""
