"""SEVERAL VERBS IN A ROW: what needs more than one of them."""
