"""The built-in stores, one backend per module; each enters through ``taskstore.backends``."""
