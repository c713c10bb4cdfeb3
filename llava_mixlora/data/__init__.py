"""Training data as people have it: read entry by entry, its images looked at, its tokens counted, its losses told.

A few samples of it are kept beside an adapter, for merging.

Imports the room `adapters`; what it imports of LLaVA is its conversation templates and its preparation of samples.
"""
