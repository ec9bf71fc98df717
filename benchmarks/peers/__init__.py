"""Other packages, each run by an interpreter of its own. Nothing here is imported by them but `measure`."""
