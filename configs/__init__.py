"""One YAML file is one experiment: its types, its loader, its presets."""
