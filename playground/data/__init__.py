"""The data of the embedded default: instruction tasks over real images."""
