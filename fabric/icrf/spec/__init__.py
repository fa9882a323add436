"""What a user writes: the configuration of a federation, read strictly, with errors that name file and line."""

from icrf.spec.config import FederationConfig
from icrf.spec.fields import SlotResources
from icrf.spec.loader import explain_sources, load_config

__all__ = ["FederationConfig", "SlotResources", "explain_sources", "load_config"]
