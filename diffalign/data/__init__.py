"""Preference pairs from every known layout, one canonical record, and caches of what the models make of them.

The folder is one line of work: :mod:`.readers` opens a data set as :class:`.records.Pair`, :mod:`.geometry` says how a
picture becomes pixels, :mod:`.cache` (or :mod:`.online`) turns pairs into training items, :mod:`.order` says which
items make up a step.
"""
