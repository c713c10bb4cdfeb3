"""Adapters and models as they lie on disk: read, checked, converted, described. Imports `method`."""
