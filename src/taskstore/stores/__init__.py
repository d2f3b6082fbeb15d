"""The built-in stores, one backend per module, registered as ``taskstore.backends``."""
