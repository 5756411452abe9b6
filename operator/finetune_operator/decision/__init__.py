"""Pure: observation → decision. No kopf, no client, no clock, no files."""
