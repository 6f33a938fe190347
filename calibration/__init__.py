"""Everything that looks at data or at a device."""
