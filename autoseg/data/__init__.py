"""WHAT THERE IS: volumes, crops, classes and label codes, read in place."""
