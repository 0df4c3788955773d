"""Settings: YAML, profile and overrides become typed values, or one clear error."""

from workflow.config.load import load_config, parse_yaml
from workflow.config.settings import (
    Config,
    DataSettings,
    ModelEntry,
    MutationSettings,
    ProofSettings,
    TrainSettings,
)

__all__ = ["Config", "DataSettings", "ModelEntry", "MutationSettings", "ProofSettings"]
__all__ += ["TrainSettings", "load_config", "parse_yaml"]
