"""Votes of people on pairs of images: which pairs, the journal of votes, the local page, and what the votes say."""
