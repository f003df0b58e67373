"""The catalogue of models, their shapes, and their costs."""
