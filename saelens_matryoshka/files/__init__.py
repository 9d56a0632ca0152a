"""Files: written whole, named, read back as data, told apart, locked."""
