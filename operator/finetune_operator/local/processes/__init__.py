"""The processes of an attempt on one machine: what they run, with which tokens and devices, and how they end."""
