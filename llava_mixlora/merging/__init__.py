"""Static stand-ins for an adapter: made, judged, merged into its base. Imports `inference` and what is below."""
