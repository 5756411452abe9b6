"""Pure decisions: what to do next, from what is observed. No client, no kopf, no clock, no files."""
