"""`report.html`: everything a reader needs to believe or doubt the result, in one file that loads nothing."""
