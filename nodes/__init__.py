"""What a person drags: shelves of thin nodes over :mod:`blended_core`, and the one file of glue to ComfyUI."""
