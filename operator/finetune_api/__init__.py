"""The resource FineTuneJob as data: spec, status, run config and report, and the schema made from them."""
