"""An application before it has a search by meaning; docs/frameworks.md adds one."""
