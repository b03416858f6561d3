"""Rewards that are computed in another process, on this machine or another: JSON and PNG over HTTP, nothing pickled.

:mod:`~diffalign.rewards.remote.server` serves any rewards, :mod:`~diffalign.rewards.remote.client` is the reward
``remote`` that asks such a server, and :mod:`~diffalign.rewards.remote.protocol` is what they say to each other.
"""
