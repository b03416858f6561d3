"""Finding a reward by name, by import path, by file or by entry point. Nothing is imported before it is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from diffalign.errors import UserError, did_you_mean
from diffalign.imports import find_callable
from diffalign.rewards.base import FunctionReward, Reward, RewardCard

GROUP = "diffalign.rewards"
"""Entry-point group through which other packages offer rewards."""

_FORMS = (
    "A reward is a name ({names}), package.module:Class, path/to/file.py:Class, or a function in place of the class."
)
_BUILT_IN: dict[str, str | Callable[..., Any]] = {
    "aesthetic": "diffalign.rewards.aesthetic:Aesthetic",
    "clipscore": "diffalign.rewards.clipscore:CLIPScore",
    "hpsv2": "diffalign.rewards.hps:HPSv2",
    "hpsv2.1": "diffalign.rewards.hps:HPSv21",
    "imagereward": "diffalign.rewards.imagereward:ImageReward",
    "jpeg_compressibility": "diffalign.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "diffalign.rewards.jpeg:JpegIncompressibility",
    "pickscore": "diffalign.rewards.clip:PickScore",
    "remote": "diffalign.rewards.remote.client:RemoteReward",
    "shapes-aesthetic": "diffalign.rewards.aesthetic:ShapesAesthetic",
    "shapes-annotator": "diffalign.rewards.shapes:ShapesAnnotator",
    "shapes-checker": "diffalign.rewards.shapes:ShapesChecker",
    "shapes-clip": "diffalign.rewards.clip:ShapesClip",
    "trained": "diffalign.rewards.trained:TrainedReward",
}
_registered: dict[str, str | Callable[..., Any]] = {}


def register(name: str, target: str | Callable[..., Any]) -> None:
    """Give a reward a name for this process.

    Args:
        target: a Reward class, a function that makes or is one, or "package.module:object" to be imported when needed.

    Raises:
        UserError: the name is taken, or has a colon.
    """
    if name in _BUILT_IN or name in _registered:
        raise UserError(f"there is a reward {name!r} already")
    if ":" in name:
        raise UserError(f"the name of a reward cannot have a colon: {name!r}")
    _registered[name] = target


def names() -> list[str]:
    """Names of all rewards: built in, registered, and of installed packages."""
    return sorted({*_BUILT_IN, *_registered, *entry_points(group=GROUP).names})


def card(reward: str) -> RewardCard:
    """What there is to know about a reward without making or loading it; only its module is imported.

    Args:
        reward: any form that :func:`load_reward` takes as text.

    Raises:
        UserError: nothing of this; says what is near.
    """
    name = reward.partition(":")[0]
    found = _named(name)
    target, name = (_find(reward), "") if found is None else (_find(found), name)
    if inspect.isclass(target) and issubclass(target, Reward):
        return target.card(name)
    return RewardCard(name or reward, (inspect.getdoc(target) or "").partition("\n")[0])


def cards() -> tuple[list[RewardCard], list[str]]:
    """The cards of all :func:`names`, and what is wrong with rewards of other packages that have none."""
    found, problems = [], []
    for name in names():
        try:
            found.append(card(name))
        except Exception as error:
            if name in _BUILT_IN:
                raise
            problems.append(f"{name} cannot be used: {type(error).__name__}: {error}")
    return found, problems


def load_reward(reward: str | Reward | Callable[..., Any], /, **options: Any) -> Reward:
    """Make a reward ready; its model loads with the first images.

    Args:
        reward: a name; ``NAME:CHECKPOINT`` for another checkpoint of the same kind; ``package.module:Class``;
            ``path/to/file.py:Class``; a class; or a function, either of ``(images, prompts, metadata)``, which is then
            itself the reward, or one that returns a reward. A Reward is returned as it is.
        options: of its constructor, such as device, dtype, batch_size.

    Raises:
        UserError: nothing of this; says what is near.
    """
    if isinstance(reward, Reward):
        return reward
    if not isinstance(reward, str):
        return _make(reward, getattr(reward, "__name__", type(reward).__name__), options)
    name, colon, rest = reward.partition(":")
    if _named(name) is not None:
        if colon:
            options = {"checkpoint": rest, **options}
        return _make(_find(_named(name)), name, options)
    return _make(_find(reward), reward, options)


def _named(name: str) -> str | Callable[..., Any] | None:
    if name in _BUILT_IN or name in _registered:
        return _BUILT_IN.get(name) or _registered[name]
    points = list(entry_points(group=GROUP, name=name))
    if len(points) > 1:
        places = ", ".join(f"{point.value} ({point.dist.name if point.dist else 'unknown'})" for point in points)
        raise UserError(f"several packages offer a reward {name!r}: {places}. Name it by its module:class instead.")
    return f"{points[0].module}:{points[0].attr}" if points else None


def _find(target: str | Callable[..., Any] | None) -> Callable[..., Any]:
    """The object that ``place:object`` names."""
    if target is not None and not isinstance(target, str):
        return target
    place, colon, attribute = (target or "").rpartition(":")
    if not colon or not place or not attribute:
        if (target or "").endswith(".py"):
            raise UserError(f"which reward of {target}? Write {target}:ClassOrFunction")
        known = names()
        forms = _FORMS.format(names=", ".join(known))
        raise UserError(f"there is no reward {target!r}.{did_you_mean(target or '', known)} {forms}")
    return find_callable(str(target), "reward", known=names())


def _make(target: Callable[..., Any], name: str, options: Mapping[str, Any]) -> Reward:
    given = {key: value for key, value in options.items() if value is not None}
    if _is_reward_function(target):
        return _wrap(target, name, given)
    accepted = _accepted(target)
    unknown = [key for key in given if accepted is not None and key not in accepted]
    # A function that makes a reward need not care where it runs.
    if inspect.isclass(target) and unknown:
        raise UserError(f"the reward {name} has no option {unknown[0]!r}.{did_you_mean(unknown[0], accepted or ())}")
    made = target(**{key: value for key, value in given.items() if key not in unknown})
    if isinstance(made, Reward):
        made.name = made.name or name
        return made
    if callable(made):
        return _wrap(made, name, given)
    raise UserError(f"{name} made a {type(made).__name__}, not a reward")


def _wrap(function: Callable[..., Any], name: str, options: Mapping[str, Any]) -> FunctionReward:
    known = ("device", "dtype", "batch_size", "offload")
    unknown = [key for key in options if key not in known]
    if unknown:
        raise UserError(f"the reward {name} is a function, which has no option {unknown[0]!r}")
    return FunctionReward(function, name.rpartition(":")[2], **options)


def _accepted(target: Callable[..., Any]) -> set[str] | None:
    """Names of the options that a class (with its bases) or a function takes; None if it takes any."""
    bases = [base for base in target.__mro__ if "__init__" in vars(base)] if inspect.isclass(target) else [target]
    names: set[str] = set()
    for base in bases:
        parameters = inspect.signature(base.__init__ if inspect.isclass(base) else base).parameters.values()
        names.update(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names - {"self"}
    return None


def _is_reward_function(target: Callable[..., Any]) -> bool:
    """Whether it takes images, rather than makes something that does."""
    if inspect.isclass(target):
        return False
    positional = [
        p
        for p in inspect.signature(target).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return bool(positional)
