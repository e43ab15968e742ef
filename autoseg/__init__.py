"""autoseg looks at labelled volume EM and at your machine, and decides, trains, predicts and scores."""

__version__ = "0.1.0"
