"""Static stand-ins for an adapter: made, judged, and merged into its base."""
