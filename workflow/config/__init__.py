"""Settings: the YAML, a profile and overrides become typed values, or one clear error."""
