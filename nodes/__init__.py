"""The nodes of the pack: schema, unit conversion, and calls into :mod:`blended_core`. ComfyUI loads them through :mod:`.extension`."""
