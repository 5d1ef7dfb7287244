"""The suites, one file each: what was released is read, and a loader registered under its name (docs/evaluation.md)."""
