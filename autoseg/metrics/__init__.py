"""COUNTING: numpy in, counts out."""
