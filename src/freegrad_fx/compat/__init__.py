"""Other packages' interfaces on top of this one: `freegrad`."""
