"""Prepared data: what Prepare writes and Train and Evaluate read."""
