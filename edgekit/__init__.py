"""edgekit: from a folder of labelled images to a bundle that proves itself on an edge device."""

__version__ = "0.1.0"
