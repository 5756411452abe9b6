"""Pure: spec, model shape and lengths → plan (memory, steps, hours, price). No kopf, no client, no clock."""
