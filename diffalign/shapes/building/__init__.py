"""How the bundled models and data are made. Only ``scripts/build_shapes.py`` and its tests import this."""
