"""SHOWING IT: artifacts become tables, figures and a page."""
