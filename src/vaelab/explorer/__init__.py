"""The latent explorer: a page on which a model's latent space is moved through by pointer, sliders and drawings.

``world`` is what the page knows of a run, ``server`` answers it, ``static`` writes it as files that need no server.
"""
