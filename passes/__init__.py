"""The rewrites: one per file, found by listing this package."""
