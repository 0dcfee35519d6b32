"""Fields of a config: defaults, rules, and the parts that are built from them."""

from hjepa_jax.config.defaults import Config, base_config

__all__ = ["Config", "base_config"]
