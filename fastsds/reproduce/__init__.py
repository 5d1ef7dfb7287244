"""`fastsds reproduce FILE.yaml`: backbones x arms x data sizes x seeds, trained and asked from one file, ending in a table."""
