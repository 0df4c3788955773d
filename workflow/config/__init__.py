"""Settings: YAML, profile and overrides become typed values, or one clear error."""

from workflow.config.load import load_config, parse_yaml
from workflow.config.settings import Config, DataSettings, ProofSettings
