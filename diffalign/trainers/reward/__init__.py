"""``diffalign train-reward``: a reward model of one's own from preference pairs.

:mod:`.config` are its settings, :mod:`.data` the pairs and their split by prompt, :mod:`.scorer` what trains,
:mod:`.trainer` the run, :mod:`.report` what is said of the result.
"""
