"""From a rule's name to the rule that a federation follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icrf.errors import ConfigError
from icrf.learning.aggregation.base import AGGREGATORS, MeanAggregator, UpdateAggregator
from icrf.learning.aggregation.clustered import Ifca
from icrf.learning.aggregation.coded import coded
from icrf.learning.injection import accepted_arguments


def build_aggregator(name: str, settings: Mapping[str, Any], num_models: int = 1) -> MeanAggregator | UpdateAggregator:
    """The rule of this name.

    Args:
        name: a registered name, ``module:attr`` or an entry point of ``icrf.aggregator``.
        settings: the configuration's keys.
        num_models: how many models the federation learns; with several, each follows the rule, see :class:`Ifca`.

    Raises:
        ConfigError: C010 unknown name, C017 code that cannot be loaded, that raises, or that makes no rule;
            C008 settings that contradict each other.
    """
    kind = AGGREGATORS.get(name)
    given = {key: value for key, value in settings.items() if value is not None}
    place = AGGREGATORS.key
    with AGGREGATORS.calling(name):
        rule = kind(**accepted_arguments(kind, given))
    if not isinstance(rule, MeanAggregator | UpdateAggregator):
        message = f"'{name}' made a value of type {type(rule).__name__}"
        raise ConfigError("C017", message, place=place, allowed="a MeanAggregator or an UpdateAggregator")
    if rule.rows.every_update != isinstance(rule, UpdateAggregator):
        message = f"'{name}' has rows with every_update {rule.rows.every_update}"
        raise ConfigError("C017", message, place=place, allowed="true for an UpdateAggregator only")
    if rule.rows.every_update and (rule.rows.up != 1 or rule.rows.scalars):
        message = f"'{name}' has rows with every_update, up {rule.rows.up} and scalars {rule.rows.scalars}"
        raise ConfigError("C017", message, place=place, allowed="up 1 and scalars 0: the updates are whole models")
    return coded(name, rule if num_models == 1 else Ifca(rule, num_models), settings)
