"""Devices that exist on paper: described in TOML, checked, and simulated bit for bit with cycles and energy."""
