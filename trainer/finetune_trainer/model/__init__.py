"""The model: loading without any rank holding it whole, adapters, sharding, attention over documents, the loss."""
